/* Mounts and unmounts volumes while the guest runs. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "boot_config.h"
#include "protocol.h"
#include "root.h"
#include "util.h"
#include "worker.h"

#define HOT_PLUG_WAIT_MS 10000
#define MAX_HOLDERS 16

int mount_worker(struct field_reader *request)
{
    struct volume volume;
    struct field field;
    if (!next_field(request, &field) || field.tag != TAG_VOLUME || !parse_volume(&volume, field.value, field.length))
        return worker_failed(EINVAL, "volume");
    const char *failure = mount_volume(NULL, &volume, HOT_PLUG_WAIT_MS);
    return failure ? worker_failed(0, "%s", failure) : 0;
}

/* Whether a link of /proc leads onto the device. */
static bool leads_to(dev_t device, const char *link)
{
    struct stat st;
    return stat(link, &st) == 0 && st.st_dev == device;
}

static bool maps_device(const char *pid, dev_t device)
{
    char path[64], line[PATH_MAX + 128];
    snprintf(path, sizeof path, "/proc/%.16s/maps", pid);
    FILE *maps = fopen(path, "re");
    bool found = false;
    while (maps && !found && fgets(line, sizeof line, maps)) {
        unsigned its_major, its_minor;
        found =
            sscanf(line, "%*s %*s %*s %x:%x", &its_major, &its_minor) == 2 && makedev(its_major, its_minor) == device;
    }
    if (maps)
        fclose(maps);
    return found;
}

static bool holds(const char *pid, dev_t device)
{
    static const char *const links[] = {"cwd", "root", "exe"};
    char path[400];
    for (size_t i = 0; i < LENGTH(links); i++) {
        snprintf(path, sizeof path, "/proc/%.16s/%s", pid, links[i]);
        if (leads_to(device, path))
            return true;
    }
    snprintf(path, sizeof path, "/proc/%.16s/fd", pid);
    DIR *dir = opendir(path);
    bool found = false;
    for (struct dirent *entry; dir && !found && (entry = readdir(dir));) {
        snprintf(path, sizeof path, "/proc/%.16s/fd/%s", pid, entry->d_name);
        found = entry->d_name[0] != '.' && leads_to(device, path);
    }
    if (dir)
        closedir(dir);
    return found || maps_device(pid, device);
}

/* Reports which processes keep the volume from being unmounted: "12 (postgres)" for each. */
static void report_holders(dev_t device)
{
    uint8_t buffer[4096];
    struct field_writer writer = {buffer, sizeof buffer, 0, false};
    DIR *dir = opendir("/proc");
    size_t count = 0;
    for (struct dirent *entry; dir && count < MAX_HOLDERS && (entry = readdir(dir));) {
        char path[64], comm[64], text[128];
        bool is_process = entry->d_name[0] >= '0' && entry->d_name[0] <= '9';
        if (!is_process || atoi(entry->d_name) == getpid() || !holds(entry->d_name, device))
            continue;
        snprintf(path, sizeof path, "/proc/%.16s/comm", entry->d_name);
        if (read_file(path, comm, sizeof comm) < 0)
            continue;
        snprintf(text, sizeof text, "%.16s (%s)", entry->d_name, comm);
        put_text_field(&writer, TAG_HOLDER, text);
        count++;
    }
    if (dir)
        closedir(dir);
    worker_reply(&writer);
}

int unmount_worker(struct field_reader *request)
{
    const char *path = NULL;
    struct field field;
    struct stat st, parent;
    char above[PATH_MAX];
    if (!next_field(request, &field) || field.tag != TAG_PATH || !field_text(&field, &path) || path[0] != '/')
        return worker_failed(EINVAL, "unmount");
    snprintf(above, sizeof above, "%s/..", path);
    if (stat(path, &st) < 0)
        return errno == ENOENT ? 0 : worker_failed(errno, "%s", path);
    /* Unmounted already: a repeated request succeeds. */
    if (stat(above, &parent) < 0 || parent.st_dev == st.st_dev)
        return 0;
    sync();
    if (umount2(path, UMOUNT_NOFOLLOW) == 0)
        return 0;
    int error = errno;
    if (error == EBUSY)
        report_holders(st.st_dev);
    return worker_failed(error, "%s", path);
}
