/* Load and memory of the guest; bringing plugged memory online. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/sysinfo.h>

#include "protocol.h"
#include "util.h"
#include "worker.h"

static uint64_t memory_field(const char *text, const char *name)
{
    unsigned long long kilobytes = 0;
    const char *at = strstr(text, name);
    if (at)
        sscanf(at + strlen(name), " %llu", &kilobytes);
    return kilobytes * 1024;
}

static void put_memory(struct field_writer *writer)
{
    char text[4096];
    if (read_file("/proc/meminfo", text, sizeof text) <= 0)
        return;
    put_u64_field(writer, TAG_MEMORY_TOTAL, memory_field(text, "MemTotal:"));
    put_u64_field(writer, TAG_MEMORY_AVAILABLE, memory_field(text, "MemAvailable:"));
}

int metrics_worker(struct field_reader *request)
{
    (void)request;
    uint8_t buffer[256];
    struct field_writer writer = {buffer, sizeof buffer, 0, false};
    struct sysinfo info;
    if (sysinfo(&info) < 0)
        return worker_failed(errno, "sysinfo");
    put_memory(&writer);
    /* Load averages are fixed point with 16 bits; sent in thousandths. */
    put_u32_field(&writer, TAG_LOAD_1, (uint32_t)(info.loads[0] * 1000 >> SI_LOAD_SHIFT));
    put_u32_field(&writer, TAG_LOAD_5, (uint32_t)(info.loads[1] * 1000 >> SI_LOAD_SHIFT));
    put_u32_field(&writer, TAG_LOAD_15, (uint32_t)(info.loads[2] * 1000 >> SI_LOAD_SHIFT));
    put_u64_field(&writer, TAG_UPTIME_MS, (uint64_t)now_ms());
    put_u32_field(&writer, TAG_PROCESSES, info.procs);
    return worker_reply(&writer);
}

static bool is_offline(const char *state_path)
{
    char state[32];
    return read_file(state_path, state, sizeof state) > 0 && strcmp(state, "offline") == 0;
}

/* Brings plugged blocks of memory online. The kernel does so by itself, too: one that refuses may just have come
 * online. */
int memory_worker(struct field_reader *request)
{
    (void)request;
    uint8_t buffer[128];
    struct field_writer writer = {buffer, sizeof buffer, 0, false};
    DIR *dir = opendir("/sys/devices/system/memory");
    int error = 0;
    for (struct dirent *entry; dir && !error && (entry = readdir(dir));) {
        char path[400];
        if (strncmp(entry->d_name, "memory", 6) != 0)
            continue;
        snprintf(path, sizeof path, "/sys/devices/system/memory/%s/state", entry->d_name);
        if (is_offline(path) && write_file(path, "online_movable") < 0 && write_file(path, "online") < 0) {
            int why = errno;
            if (is_offline(path))
                error = worker_failed(why, "%s", path);
        }
    }
    if (dir)
        closedir(dir);
    put_memory(&writer);
    return error ? error : worker_reply(&writer);
}
