/* Prints what the guest's parser understands of the boot disk on standard input; entries end in a unit separator. */
#include <stdio.h>
#include <string.h>

#include "boot_config.h"
#include "bytes.h"

#define END "\x1f"

int main(void)
{
    static uint8_t disk[BOOT_MAX_FIELDS + 8192];
    static struct boot_config c;
    uint32_t length, crc, outcome;
    size_t size = fread(disk, 1, sizeof disk, stdin);
    if (size < BOOT_HEADER_BYTES || parse_boot_header(disk, &length, &crc, &outcome)
        || size < BOOT_HEADER_BYTES + length || crc32_of(disk + BOOT_HEADER_BYTES, length) != crc
        || parse_boot_fields(&c, disk + BOOT_HEADER_BYTES, length))
        return 1;
    printf("instance_id=%s" END "hostname=%s" END "nonce=", c.instance_id, c.hostname);
    for (int i = 0; i < NONCE_BYTES; i++)
        printf("%02x", c.nonce[i]);
    printf(END "cwd=%s" END "user=%s" END "root_fs=%s" END "console=%s" END, c.cwd, c.user, c.root_fs, c.console);
    printf("numbers=%d %u %llu %d %d %llu" END, c.overlay, c.stop_signal, (unsigned long long)c.grace_ms, c.skip_agent,
           c.power_off_by_reset, (unsigned long long)c.clock_ns);
    for (char **s = c.argv; *s; s++)
        printf("arg=%s" END, *s);
    for (char **s = c.env; *s; s++)
        printf("env=%s" END, *s);
    for (size_t i = 0; i < c.volume_count; i++)
        printf("volume=%s %s %s %d %d" END, c.volumes[i].disk_id, c.volumes[i].path, c.volumes[i].fs_type,
               c.volumes[i].readonly, c.volumes[i].files);
    for (size_t i = 0; i < c.ca_count; i++)
        printf("ca=%s" END, c.cas[i].pem);
    if (c.network.present) {
        const uint8_t *a = c.network.address, *g = c.network.gateway;
        printf("network=%d.%d.%d.%d/%d %d.%d.%d.%d %u" END, a[0], a[1], a[2], a[3], c.network.prefix, g[0], g[1], g[2],
               g[3], c.network.mtu);
    }
    printf("guest=%d %llu" END, c.pid1, (unsigned long long)c.shm_bytes);
    for (size_t i = 0; i < c.volume_dir_count; i++)
        printf("volume_dir=%s" END, c.volume_dirs[i]);
    for (size_t i = 0; i < c.sysctl_count; i++)
        printf("sysctl=%s" END, c.sysctls[i]);
    for (size_t i = 0; i < c.ulimit_count; i++)
        printf("ulimit=%u %llu %llu" END, c.ulimits[i].resource, (unsigned long long)c.ulimits[i].soft,
               (unsigned long long)c.ulimits[i].hard);
    return 0;
}
