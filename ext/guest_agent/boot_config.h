/* The configuration of this boot, as the host wrote it to the boot disk. Twin of hypeman/guest/boot.py. */
#ifndef HM_BOOT_CONFIG_H
#define HM_BOOT_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "fields.h"
#include "protocol.h"

#define MAX_VOLUMES 32
#define MAX_DNS 4
#define MAX_CAS 8
#define MAX_DISKS 64
#define MAX_VOLUME_DIRS 256
#define MAX_SYSCTLS 64
#define MAX_ULIMITS 16
/* Arguments and variables together; their bytes are bounded by BOOT_MAX_FIELDS. */
#define MAX_STRINGS 8192

struct volume {
    const char *disk_id, *path, *fs_type;
    const char *overlay_disk_id; /* NULL without a private write layer */
    bool readonly;
    bool files; /* each of its files is mounted by itself, over the file at the same path below `path` */
};

struct network {
    bool present;
    uint8_t mac[6];
    uint8_t address[4], gateway[4]; /* gateway 0.0.0.0: no default route */
    uint8_t prefix;
    uint32_t mtu; /* 0 leaves it alone */
    uint8_t dns[MAX_DNS][4];
    size_t dns_count;
};

struct ca_certificate {
    const char *pem, *hash; /* hash: OpenSSL's subject hash in hexadecimal, or NULL */
};

struct ulimit {
    uint32_t resource; /* RLIMIT_NOFILE … */
    uint64_t soft, hard;
};

struct boot_config {
    const char *instance_id, *hostname, *machine_id;
    uint8_t nonce[NONCE_BYTES];
    char *strings[MAX_STRINGS + 4]; /* argv, NULL, env, NULL */
    char **argv, **env;
    const char *cwd, *user;
    const char *root_fs; /* "erofs" or "ext4" */
    bool overlay;        /* a disk "overlay" takes the writes, else memory */
    struct volume volumes[MAX_VOLUMES];
    size_t volume_count;
    struct network network;
    struct ca_certificate cas[MAX_CAS];
    size_t ca_count;
    const char *disk_order[MAX_DISKS]; /* ids in the order of the devices, for VMMs without serial numbers */
    size_t disk_count;
    uint32_t stop_signal;
    uint64_t grace_ms;
    bool skip_agent;
    bool idle; /* no program is started; the guest runs until it is stopped */
    bool power_off_by_reset;
    uint64_t clock_ns; /* since 1970; 0 leaves the clock alone */
    const char *console;
    const char *volume_dirs[MAX_VOLUME_DIRS]; /* directories that the image declares as volumes */
    size_t volume_dir_count;
    uint8_t pid1;                     /* enum pid1 */
    uint64_t shm_bytes;               /* size of /dev/shm; 0: half of the memory */
    const char *sysctls[MAX_SYSCTLS]; /* "name=value" */
    size_t sysctl_count;
    struct ulimit ulimits[MAX_ULIMITS];
    size_t ulimit_count;
};

/* Reads the fields of a boot disk; texts point into `data`. NULL, or an error message. */
const char *parse_boot_fields(struct boot_config *config, const uint8_t *data, size_t length);

/* Checks a boot disk's header. NULL, or an error message; *length and *crc are of the fields after it. */
const char *parse_boot_header(const uint8_t *header, uint32_t *length, uint32_t *crc, uint32_t *outcome_offset);

/* One volume or network from its nested fields; also used by requests. */
bool parse_volume(struct volume *volume, const uint8_t *data, size_t length);
/* Stores a field that belongs to a network; false if it does not, or is malformed. */
bool parse_network_field(struct network *network, const struct field *field);

#endif
