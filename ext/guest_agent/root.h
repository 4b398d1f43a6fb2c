/* Builds the root file system of the instance and switches to it; mounts and unmounts volumes. */
#ifndef HM_ROOT_H
#define HM_ROOT_H

#include "boot_config.h"

/* /proc, /sys and /dev of the initramfs, enough to find disks. NULL, or an error message. */
const char *mount_early(void);
#define BOOT_DISK_WAIT_MS 10000

/* Root image and overlay, beside the initramfs. NULL, or an error message. */
const char *mount_root(const struct boot_config *config);
/* Makes that the root of this process and all its children, and empties the initramfs. */
const char *switch_root(void);
/* The directories that the image declares as volumes exist afterwards, empty ones on the instance's own disk. In the new
 * root. Failures are only logged: the image may run without. */
void make_volume_dirs(const struct boot_config *config);
/* The kernel's file systems in the new root. NULL, or an error message. */
const char *mount_late(uint64_t shm_bytes);

/* Mounts one volume; symlinks on the way are resolved in the new root. NULL, or an error message. */
const char *mount_volume(const struct boot_config *config, const struct volume *volume, int wait_ms);

/* Quiesces all file systems on disks: volumes are unmounted, the overlay's disk is frozen in a clean state. */
void quiesce_disks(void);

#endif
