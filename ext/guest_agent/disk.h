/* Block devices by the serial number that the host gave them. */
#ifndef HM_DISK_H
#define HM_DISK_H

#include <stddef.h>

#include "boot_config.h"

#define DEVICE_PATH_BYTES 48

/* Finds "/dev/<name>" of the disk with this id: by its virtio serial (of which the kernel keeps 20 bytes),
 * or by its position in `config->disk_order` where the VMM has no serial numbers. Waits up to wait_ms for it to appear.
 * 0, or -1. `config` may be NULL. */
int find_disk(const struct boot_config *config, const char *id, char path[DEVICE_PATH_BYTES], int wait_ms);

/* Finds the boot disk (serial "boot", else by its magic) and reads it; the config points into memory that is
 * never freed. NULL, or an error message. `path` then names the device; *outcome_offset is where the outcome is
 * written. */
const char *read_boot_disk(struct boot_config *config, char path[DEVICE_PATH_BYTES], uint32_t *outcome_offset);

/* The nth virtio disk (vda is 0) as a device path; -1 if there is none. */
int nth_disk(size_t n, char path[DEVICE_PATH_BYTES]);

#endif
