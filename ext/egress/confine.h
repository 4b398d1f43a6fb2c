/* Confines an engine process. */
#ifndef HYPEMAN_EGRESS_CONFINE_H
#define HYPEMAN_EGRESS_CONFINE_H

#include <stdbool.h>
#include <stddef.h>

/* Permanently drops what a running engine does not need: files (an empty root directory), capabilities, the user root
 * (it becomes `uid`), new programs and processes, most system calls, core dumps, swap. Open descriptors stay. To be
 * called before there are threads. What only root can drop is kept if the caller is not root. False: it failed with
 * `error`, and the process must end. *locked: all its memory is locked, which requires an unlimited RLIMIT_MEMLOCK. */
bool confine(unsigned uid, int *locked, char *error, size_t n);

#endif
