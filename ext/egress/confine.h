/* The walls around an engine process. */
#ifndef HYPEMAN_EGRESS_CONFINE_H
#define HYPEMAN_EGRESS_CONFINE_H

#include <stdbool.h>
#include <stddef.h>

/* Permanently gives up what a running engine does not need: files (an empty root directory), capabilities, the user root
 * (it becomes `uid`), new programs and processes, most system calls, core dumps, swap. Descriptors that are open stay.
 * To be called before there are threads. What only root can give up is left out if the caller is not root.
 * False: something failed, `error` says what, and the process must end. *locked: all its memory is locked,
 * which takes a process that may lock any amount. */
bool confine(unsigned uid, int *locked, char *error, size_t n);

#endif
