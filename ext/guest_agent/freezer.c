#define _GNU_SOURCE
#include "freezer.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "util.h"

#define CGROUP_ROOT "/sys/fs/cgroup"
#define SETTLE_MS 200

static int64_t thaw_at;

/* All control groups below the root; we stay in the root itself. */
static int set_frozen(const char *value) {
    DIR *dir = opendir(CGROUP_ROOT);
    if (!dir)
        return errno;
    int result = 0;
    for (struct dirent *entry; (entry = readdir(dir));) {
        char path[400];
        if (entry->d_type != DT_DIR || entry->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, CGROUP_ROOT "/%s/cgroup.freeze", entry->d_name);
        if (write_file(path, value) < 0 && errno != ENOENT)
            result = errno;
    }
    closedir(dir);
    return result;
}

static bool all_frozen(void) {
    DIR *dir = opendir(CGROUP_ROOT);
    bool frozen = true;
    for (struct dirent *entry; dir && frozen && (entry = readdir(dir));) {
        char path[400], text[256];
        if (entry->d_type != DT_DIR || entry->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, CGROUP_ROOT "/%s/cgroup.events", entry->d_name);
        frozen = read_file(path, text, sizeof text) <= 0 || strstr(text, "frozen 1") || strstr(text, "populated 0");
    }
    if (dir)
        closedir(dir);
    return frozen;
}

int freeze_guest(void) {
    int error = set_frozen("1");
    if (error) {
        set_frozen("0");
        return error;
    }
    thaw_at = now_ms() + FREEZE_LIMIT_MS;
    /* A process in the middle of a system call stops a moment later. */
    for (int waited = 0; !all_frozen() && waited < SETTLE_MS; waited++)
        sleep_ms(1);
    return 0;
}

int thaw_guest(void) {
    thaw_at = 0;
    return set_frozen("0");
}

int freezer_step(void) {
    if (!thaw_at)
        return -1;
    int64_t left = thaw_at - now_ms();
    if (left > 0)
        return (int)left;
    thaw_guest();
    return -1;
}
