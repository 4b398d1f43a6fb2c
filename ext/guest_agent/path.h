/* Paths of requests, looked up so that neither ".." nor a symlink leads out of the root. For workers only. */
#ifndef HM_PATH_H
#define HM_PATH_H

#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/* open() below the root; -1 with errno. */
int open_inside(int root, const char *path, uint64_t flags, uint64_t mode);

/* The enum file_kind of a mode. */
uint8_t file_kind_of(mode_t mode);

/* The directory that holds the last name of `path`, made with its parents (0755) if `make` is set, and that
 * name. "/" itself gives the root and ".". -1 with errno. */
int open_parent(int root, const char *path, bool make, char name[NAME_MAX + 1]);

#endif
