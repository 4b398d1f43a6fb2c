#define _GNU_SOURCE
#include "rlimits.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>

#include "util.h"

/* fs.nr_open, the most that a process may have. */
#define MAX_FILES 1048576

/* The VM is the workload's alone, so only memory limits it. Core files are off unless requested: nobody collects them,
 * and they fill the disk. */
static const struct ulimit defaults[] = {
    {RLIMIT_NOFILE, MAX_FILES, MAX_FILES},
    {RLIMIT_NPROC, RLIM_INFINITY, RLIM_INFINITY},
    {RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY},
    {RLIMIT_CORE, 0, RLIM_INFINITY},
};
static const struct ulimit *own;
static size_t own_count;

/* "net.core.somaxconn" or "net/core/somaxconn", as sysctl(8) takes them: the first separator tells which it is. */
static bool sysctl_path(const char *name, size_t length, char *path, size_t capacity)
{
    size_t first = strcspn(name, "./=");
    int n = snprintf(path, capacity, "/proc/sys/%.*s", (int)length, name);
    if (n < 0 || (size_t)n >= capacity || length == 0)
        return false;
    for (char *c = path + strlen("/proc/sys/"); name[first] == '.' && *c; c++)
        *c = *c == '.' ? '/' : *c == '/' ? '.' : *c;
    return !strstr(path, "/../") && strncmp(path, "/proc/sys//", 11) != 0;
}

const char *set_kernel_limits(const struct boot_config *config)
{
    static const char *const settings[][2] = {
        /* As in a container: any user may listen on low ports and ping. */
        {"net/ipv4/ip_unprivileged_port_start", "0"},
        {"net/ipv4/ping_group_range", "0 2147483647"},
        /* What databases, watchers and servers need. */
        {"vm/max_map_count", "262144"},
        {"fs/inotify/max_user_instances", "8192"},
        {"fs/inotify/max_user_watches", "1048576"},
        {"fs/aio-max-nr", "1048576"},
        {"fs/file-max", "9223372036854775807"},
        {"kernel/pid_max", "4194304"},
    };
    static char problem[300];
    char path[PATH_MAX];
    for (size_t i = 0; i < LENGTH(settings); i++) {
        snprintf(path, sizeof path, "/proc/sys/%s", settings[i][0]);
        write_file(path, settings[i][1]);
    }
    own = config->ulimits;
    own_count = config->ulimit_count;
    for (size_t i = 0; i < config->sysctl_count; i++) {
        const char *setting = config->sysctls[i], *value = strchr(setting, '=');
        errno = EINVAL;
        if (value && sysctl_path(setting, (size_t)(value - setting), path, sizeof path)
            && write_file(path, value + 1) == 0)
            continue;
        snprintf(problem, sizeof problem, "cannot set the sysctl %.200s: %s", setting, strerror(errno));
        return problem;
    }
    return NULL;
}

void limit_process(void)
{
    for (size_t i = 0; i < LENGTH(defaults); i++)
        setrlimit((int)defaults[i].resource, &(struct rlimit){defaults[i].soft, defaults[i].hard});
    for (size_t i = 0; i < own_count; i++)
        setrlimit((int)own[i].resource, &(struct rlimit){own[i].soft, own[i].hard});
}
