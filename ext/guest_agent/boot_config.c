#include "boot_config.h"

#include <string.h>

#include "bytes.h"

const char *parse_boot_header(const uint8_t *header, uint32_t *length, uint32_t *crc, uint32_t *outcome_offset)
{
    if (memcmp(header, BOOT_MAGIC, MAGIC_BYTES) != 0)
        return "no boot disk";
    if (get_u32(header + 8) != PROTOCOL_VERSION)
        return "boot disk has an unsupported version";
    *length = get_u32(header + 12);
    *crc = get_u32(header + 16);
    *outcome_offset = get_u32(header + 20);
    if (*length > BOOT_MAX_FIELDS || *outcome_offset % 512 != 0 || *outcome_offset < BOOT_HEADER_BYTES + *length)
        return "boot disk has invalid sizes";
    return NULL;
}

bool parse_volume(struct volume *volume, const uint8_t *data, size_t length)
{
    struct field_reader reader = read_fields(data, length);
    struct field field;
    *volume = (struct volume){.fs_type = "ext4"};
    while (next_field(&reader, &field)) {
        bool good = false;
        switch (field.tag) {
        case TAG_DISK_ID:
            good = field_text(&field, &volume->disk_id);
            break;
        case TAG_PATH:
            good = field_text(&field, &volume->path);
            break;
        case TAG_FS_TYPE:
            good = field_text(&field, &volume->fs_type);
            break;
        case TAG_OVERLAY_DISK_ID:
            good = field_text(&field, &volume->overlay_disk_id);
            break;
        case TAG_READONLY:
            good = field_bool(&field, &volume->readonly);
            break;
        case TAG_FILES:
            good = field_bool(&field, &volume->files);
            break;
        }
        if (!good)
            return false;
    }
    return !reader.malformed && volume->disk_id && volume->path && volume->path[0] == '/';
}

bool parse_network_field(struct network *network, const struct field *field)
{
    switch (field->tag) {
    case TAG_MAC:
        network->present = true;
        return field_bytes(field, network->mac, sizeof network->mac);
    case TAG_ADDRESS:
        return field_bytes(field, network->address, sizeof network->address);
    case TAG_GATEWAY:
        return field_bytes(field, network->gateway, sizeof network->gateway);
    case TAG_PREFIX:
        return field_u8(field, &network->prefix) && network->prefix <= 32;
    case TAG_MTU:
        return field_u32(field, &network->mtu);
    case TAG_DNS:
        return network->dns_count < MAX_DNS && field_bytes(field, network->dns[network->dns_count++], 4);
    default:
        return false;
    }
}

static bool parse_ca(struct ca_certificate *ca, const uint8_t *data, size_t length)
{
    struct field_reader reader = read_fields(data, length);
    struct field field;
    *ca = (struct ca_certificate){0};
    while (next_field(&reader, &field)) {
        if (field.tag == TAG_CA_PEM ? !field_text(&field, &ca->pem)
                                    : field.tag != TAG_CA_HASH || !field_text(&field, &ca->hash))
            return false;
    }
    return !reader.malformed && ca->pem && (!ca->hash || !strchr(ca->hash, '/'));
}

static bool parse_ulimit(struct ulimit *limit, const struct field *field)
{
    uint8_t bytes[20];
    if (!field_bytes(field, bytes, sizeof bytes))
        return false;
    *limit = (struct ulimit){get_u32(bytes), get_u64(bytes + 4), get_u64(bytes + 12)};
    return true;
}

/* Arguments first, then variables; the writer keeps that order. */
static bool add_string(struct boot_config *config, const struct field *field, size_t *count, size_t *env_begin)
{
    const char *text;
    if (*count >= MAX_STRINGS || !field_text(field, &text))
        return false;
    if (field->tag == TAG_ENV && !*env_begin) {
        config->strings[(*count)++] = NULL;
        *env_begin = *count;
    } else if (field->tag == TAG_ARG && *env_begin) {
        return false;
    }
    config->strings[(*count)++] = (char *)text;
    return true;
}

const char *parse_boot_fields(struct boot_config *config, const uint8_t *data, size_t length)
{
    struct field_reader reader = read_fields(data, length);
    struct field field;
    size_t strings = 0, env_begin = 0;
    bool have_nonce = false;
    memset(config, 0, sizeof *config);
    config->cwd = config->user = config->hostname = config->machine_id = config->console = "";
    config->stop_signal = 15;
    while (next_field(&reader, &field)) {
        bool good = false;
        switch (field.tag) {
        case TAG_INSTANCE_ID:
            good = field_text(&field, &config->instance_id);
            break;
        case TAG_HOSTNAME:
            good = field_text(&field, &config->hostname);
            break;
        case TAG_MACHINE_ID:
            good = field_text(&field, &config->machine_id);
            break;
        case TAG_NONCE:
            good = have_nonce = field_bytes(&field, config->nonce, NONCE_BYTES);
            break;
        case TAG_ARG:
        case TAG_ENV:
            good = add_string(config, &field, &strings, &env_begin);
            break;
        case TAG_CWD:
            good = field_text(&field, &config->cwd);
            break;
        case TAG_USER:
            good = field_text(&field, &config->user);
            break;
        case TAG_ROOT_FS:
            good = field_text(&field, &config->root_fs);
            break;
        case TAG_OVERLAY:
            good = field_bool(&field, &config->overlay);
            break;
        case TAG_VOLUME:
            good = config->volume_count < MAX_VOLUMES
                && parse_volume(&config->volumes[config->volume_count++], field.value, field.length);
            break;
        case TAG_CA:
            good = config->ca_count < MAX_CAS && parse_ca(&config->cas[config->ca_count++], field.value, field.length);
            break;
        case TAG_DISK_ORDER:
            good = config->disk_count < MAX_DISKS && field_text(&field, &config->disk_order[config->disk_count++]);
            break;
        case TAG_STOP_SIGNAL:
            good = field_u32(&field, &config->stop_signal) && config->stop_signal <= 64;
            break;
        case TAG_GRACE_MS:
            good = field_u64(&field, &config->grace_ms);
            break;
        case TAG_IDLE:
            good = field_bool(&field, &config->idle);
            break;
        case TAG_SKIP_AGENT:
            good = field_bool(&field, &config->skip_agent);
            break;
        case TAG_POWER_OFF_BY_RESET:
            good = field_bool(&field, &config->power_off_by_reset);
            break;
        case TAG_CLOCK_NS:
            good = field_u64(&field, &config->clock_ns);
            break;
        case TAG_CONSOLE:
            good = field_text(&field, &config->console);
            break;
        case TAG_VOLUME_DIR:
            good = config->volume_dir_count < MAX_VOLUME_DIRS
                && field_text(&field, &config->volume_dirs[config->volume_dir_count++]);
            break;
        case TAG_PID1:
            good = field_u8(&field, &config->pid1) && config->pid1 <= PID1_WORKLOAD;
            break;
        case TAG_SHM_BYTES:
            good = field_u64(&field, &config->shm_bytes);
            break;
        case TAG_SYSCTL:
            good = config->sysctl_count < MAX_SYSCTLS && field_text(&field, &config->sysctls[config->sysctl_count++]);
            break;
        case TAG_ULIMIT:
            good = config->ulimit_count < MAX_ULIMITS && parse_ulimit(&config->ulimits[config->ulimit_count++], &field);
            break;
        default:
            good = parse_network_field(&config->network, &field);
        }
        if (!good)
            return "boot disk has a malformed field";
    }
    if (reader.malformed || !config->instance_id || !config->root_fs || !have_nonce)
        return "boot disk has missing or truncated fields";
    config->strings[strings] = NULL;
    config->strings[strings + 1] = NULL;
    config->argv = config->strings;
    config->env = config->strings + (env_begin ? env_begin : strings + 1);
    return NULL;
}
