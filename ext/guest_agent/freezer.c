#define _GNU_SOURCE
#include "freezer.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "util.h"

#define CGROUP_ROOT "/sys/fs/cgroup"
#define SETTLE_MS 200

#define MAX_KEPT 16

static int64_t thaw_at;

/* The files of a freeze stay open until the thaw: after a restore no code is translated yet, and finding them again
 * took half of the time of a thaw. */
static int kept[MAX_KEPT];
static size_t kept_count;
static bool kept_all;

static void close_kept(void)
{
    while (kept_count)
        close(kept[--kept_count]);
    kept_all = false;
}

static int set_one(const char *path, const char *value, bool keep)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return errno == ENOENT ? 0 : errno;
    int error = write_all(fd, value, strlen(value)) ? 0 : errno;
    if (keep && !error && kept_count < LENGTH(kept)) {
        kept[kept_count++] = fd;
        return 0;
    }
    kept_all = false;
    close(fd);
    return error;
}

/* All control groups below the root; we stay in the root itself. */
static int set_frozen(const char *value, bool keep)
{
    close_kept();
    DIR *dir = opendir(CGROUP_ROOT);
    if (!dir)
        return errno;
    int result = 0;
    kept_all = keep;
    for (struct dirent *entry; (entry = readdir(dir));) {
        char path[400];
        if (entry->d_type != DT_DIR || entry->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, CGROUP_ROOT "/%s/cgroup.freeze", entry->d_name);
        int error = set_one(path, value, keep);
        result = error ? error : result;
    }
    closedir(dir);
    return result;
}

/* Through the files of the freeze: no frozen process can have made another group. */
static int thaw_kept(void)
{
    int result = 0;
    for (size_t i = 0; i < kept_count; i++)
        if (!write_all(kept[i], "0", 1) && errno != ENODEV) /* the group is gone */
            result = errno;
    close_kept();
    return result;
}

static bool all_frozen(void)
{
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

int freeze_guest(void)
{
    int error = set_frozen("1", true);
    if (error) {
        set_frozen("0", false);
        return error;
    }
    thaw_at = now_ms() + FREEZE_LIMIT_MS;
    /* A process in the middle of a system call stops a moment later. */
    for (int waited = 0; !all_frozen() && waited < SETTLE_MS; waited++)
        sleep_ms(1);
    return 0;
}

int thaw_guest(void)
{
    thaw_at = 0;
    return kept_all ? thaw_kept() : set_frozen("0", false);
}

int freezer_step(void)
{
    if (!thaw_at)
        return -1;
    int64_t left = thaw_at - now_ms();
    if (left > 0)
        return (int)left;
    thaw_guest();
    return -1;
}
