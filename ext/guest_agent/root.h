/* Builds the root file system of the instance and makes it ours; mounts and unmounts volumes. */
#ifndef HM_ROOT_H
#define HM_ROOT_H

#include "boot_config.h"

/* /proc, /sys and /dev of the initramfs, enough to find disks. NULL or what went wrong. */
const char *mount_early(void);
#define BOOT_DISK_WAIT_MS 10000

/* Root image and overlay, beside the initramfs. NULL or what went wrong. */
const char *mount_root(const struct boot_config *config);
/* Makes that the root of this process and all its children, and empties the initramfs. */
const char *switch_root(void);
/* The directories that the image declares as volumes exist afterwards, empty ones on the instance's own disk. In the new
 * root. What cannot be done is logged: it need not keep the image from running. */
void make_volume_dirs(const struct boot_config *config);
/* The kernel's file systems in the new root. NULL or what went wrong. */
const char *mount_late(uint64_t shm_bytes);

/* Mounts one volume; symlinks on the way are the new root's own. NULL or what went wrong. */
const char *mount_volume(const struct boot_config *config, const struct volume *volume, int wait_ms);

/* Brings all block file systems to rest: volumes unmounted, the overlay's disk frozen in a clean state. */
void settle_disks(void);

#endif
