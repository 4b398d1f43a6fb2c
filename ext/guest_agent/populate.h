/* Fills a fresh volume from the directory that it covers. Called by root.c alone; blocks. */
#ifndef HM_POPULATE_H
#define HM_POPULATE_H

/* `volume` is the root directory of a mounted, writable volume, `covered` the directory that it was mounted on, opened
 * before the mount. An empty lost+found is removed. If the volume is empty then, it gets the owner, mode and content
 * of `covered`, as a named volume of Docker does. If interrupted, it starts over at the next mount. 0, or -1 with
 * errno. */
int populate_volume(int volume, int covered);

/* Owner, mode, extended attributes and times of one directory for another. 0, or -1 with errno. */
int copy_directory_attributes(int from, int to);
/* 1 or 0, or -1 with errno. */
int is_directory_empty(int directory);

#endif
