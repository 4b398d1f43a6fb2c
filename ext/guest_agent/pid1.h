/* Whether the image's program must be process 1, as init systems require.
 *
 * They are recognised by name (/sbin/init, init, systemd, s6's /init, my_init …), also behind symbolic links, and behind
 * an entry script that executes one: `exec /sbin/init`, `exec "$@"` with such a command, `sh -c "exec init"`.
 * An init for containers (tini, dumb-init) works as any other process. The host can override the detection.
 */
#ifndef HM_PID1_H
#define HM_PID1_H

#include <stdbool.h>

#include "boot_config.h"

/* Reads files of the guest, so only in its root. */
bool needs_pid1(const struct boot_config *config);
/* The rule itself: `argv` is what would be executed, with this value of PATH (or NULL), in the directory `cwd`. */
bool executes_init(char *const *argv, const char *path, const char *cwd);

#endif
