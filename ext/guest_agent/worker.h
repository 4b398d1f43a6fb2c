/* Workers: requests that may block or touch the guest's file system run in a child of their own.
 *
 * A worker reads its request from memory, its data from descriptor 0, writes its reply to 1 and an error message to 2,
 * and its exit status is 0 or an errno. So a hung disk, a huge tree or a bug harms one session.
 */
#ifndef HM_WORKER_H
#define HM_WORKER_H

#include <stddef.h>
#include <stdint.h>

#include "fields.h"
#include "program.h"

typedef int (*worker_function)(struct field_reader *request);

/* Forks; 0, or -1 with errno. `in_guest`: it sees the mounts that an image's init has made. */
int start_worker(worker_function function, bool in_guest, const uint8_t *request, size_t length, struct child *child);

/* Inside a worker: writes the error message and returns the errno to exit with. */
int worker_failed(int error, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Inside a worker: writes the reply. */
int worker_reply(const struct field_writer *writer);

/* Paths of requests are looked up below this directory; "/" except in tests. */
void set_worker_root(const char *path);
int open_worker_root(void);

int stat_worker(struct field_reader *request);
int copy_to_worker(struct field_reader *request);
int copy_from_worker(struct field_reader *request);
int mount_worker(struct field_reader *request);
int unmount_worker(struct field_reader *request);
int memory_worker(struct field_reader *request);
int metrics_worker(struct field_reader *request);

#endif
