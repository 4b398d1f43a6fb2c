#define _GNU_SOURCE
#include "port.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "util.h"

int open_port(const char *name, int flags)
{
    DIR *dir = opendir("/sys/class/virtio-ports");
    int fd = -1;
    for (struct dirent *entry; dir && fd < 0 && (entry = readdir(dir));) {
        char path[300], its_name[64];
        if (entry->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
        if (read_file(path, its_name, sizeof its_name) <= 0 || strcmp(its_name, name) != 0)
            continue;
        snprintf(path, sizeof path, "/dev/%.200s", entry->d_name);
        fd = open(path, flags | O_CLOEXEC | O_NONBLOCK);
    }
    if (dir)
        closedir(dir);
    return fd;
}
