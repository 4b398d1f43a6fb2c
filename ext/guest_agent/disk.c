#define _GNU_SOURCE
#include "disk.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bytes.h"
#include "util.h"

#define SERIAL_BYTES 20 /* VIRTIO_BLK_ID_BYTES */
#define BOOT_WAIT_MS 10000

static int find_by_serial(const char *id, char path[DEVICE_PATH_BYTES])
{
    DIR *dir = opendir("/sys/block");
    if (!dir)
        return -1;
    int found = -1;
    for (struct dirent *entry; found < 0 && (entry = readdir(dir));) {
        char file[300], serial[64];
        if (entry->d_name[0] == '.' || strlen(entry->d_name) > 32)
            continue;
        snprintf(file, sizeof file, "/sys/block/%s/serial", entry->d_name);
        if (read_file(file, serial, sizeof serial) > 0 && strncmp(serial, id, SERIAL_BYTES) == 0) {
            snprintf(path, DEVICE_PATH_BYTES, "/dev/%.32s", entry->d_name);
            found = 0;
        }
    }
    closedir(dir);
    return found;
}

int nth_disk(size_t n, char path[DEVICE_PATH_BYTES])
{
    /* vda … vdz, vdaa …: the kernel's own naming. */
    if (n < 26)
        snprintf(path, DEVICE_PATH_BYTES, "/dev/vd%c", (char)('a' + n));
    else
        snprintf(path, DEVICE_PATH_BYTES, "/dev/vd%c%c", (char)('a' + n / 26 - 1), (char)('a' + n % 26));
    return access(path, F_OK);
}

static int find_in_order(const struct boot_config *config, const char *id, char path[DEVICE_PATH_BYTES])
{
    for (size_t i = 0; config && i < config->disk_count; i++)
        if (strcmp(config->disk_order[i], id) == 0)
            return nth_disk(i, path);
    return -1;
}

/* A disk that is just plugged in shows its serial number a moment before it can be used (ENXIO). */
static bool can_be_opened(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0)
        close(fd);
    return fd >= 0;
}

int find_disk(const struct boot_config *config, const char *id, char path[DEVICE_PATH_BYTES], int wait_ms)
{
    int64_t deadline = now_ms() + wait_ms;
    for (;;) {
        if ((find_by_serial(id, path) == 0 || find_in_order(config, id, path) == 0) && can_be_opened(path))
            return 0;
        if (now_ms() >= deadline)
            return -1;
        sleep_ms(2);
    }
}

static const char *read_config(int fd, struct boot_config *config, uint32_t *outcome_offset)
{
    uint8_t header[512]; /* a whole sector, in case the device requires it */
    uint32_t length, crc;
    if (pread(fd, header, sizeof header, 0) != (ssize_t)sizeof header)
        return "boot disk cannot be read";
    const char *problem = parse_boot_header(header, &length, &crc, outcome_offset);
    if (problem)
        return problem;
    uint8_t *fields = malloc(length + 1);
    if (!fields)
        return "no memory for the boot disk";
    if (lseek(fd, BOOT_HEADER_BYTES, SEEK_SET) < 0 || !read_all(fd, fields, length)
        || crc32_of(fields, length) != crc) {
        free(fields);
        return "boot disk is corrupt";
    }
    return parse_boot_fields(config, fields, length);
}

static const char *try_boot_disk(const char *path, struct boot_config *config, uint32_t *outcome_offset)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return "boot disk cannot be opened";
    const char *problem = read_config(fd, config, outcome_offset);
    close(fd);
    return problem;
}

const char *read_boot_disk(struct boot_config *config, char path[DEVICE_PATH_BYTES], uint32_t *outcome_offset)
{
    int64_t deadline = now_ms() + BOOT_WAIT_MS;
    for (;; sleep_ms(2)) {
        if (find_by_serial("boot", path) == 0)
            return try_boot_disk(path, config, outcome_offset);
        for (size_t n = 0; nth_disk(n, path) == 0; n++)
            if (try_boot_disk(path, config, outcome_offset) == NULL)
                return NULL;
        if (now_ms() >= deadline)
            return "no boot disk appeared";
    }
}
