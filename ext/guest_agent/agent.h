#ifndef HM_AGENT_H
#define HM_AGENT_H

#include "boot_config.h"

/* The loop that serves the host: one poll, nothing in it blocks. `fd` >= 0 is a test's channel, and only then
 * does it return. */
void agent_run(const struct boot_config *config, int fd);

#endif
