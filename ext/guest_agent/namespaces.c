#define _GNU_SOURCE
#include "namespaces.h"

#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

#include "util.h"

static pid_t init_pid; /* 0 without an init */
static int init_pids = -1, our_pids = -1;

const char *make_init_namespaces(void)
{
    if (unshare(CLONE_NEWNS | CLONE_NEWCGROUP) < 0)
        return "namespaces";
    /* What we mount later appears inside; what is mounted inside may be shared further, as container engines require.
     * */
    if (mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL) < 0 || mount(NULL, "/", NULL, MS_REC | MS_SHARED, NULL) < 0)
        return "mount propagation";
    umount2("/proc", MNT_DETACH);
    if (mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0)
        return "/proc";
    umount2("/sys/fs/cgroup", MNT_DETACH);
    if (mount("cgroup2", "/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0)
        return "/sys/fs/cgroup";
    return NULL;
}

static int open_namespace(pid_t pid, const char *kind)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/ns/%s", pid, kind);
    return open(path, O_RDONLY | O_CLOEXEC);
}

void remember_init(pid_t pid)
{
    init_pid = pid;
    our_pids = open_namespace(getpid(), "pid");
    init_pids = open_namespace(pid, "pid");
}

bool join_init_pids(void)
{
    return init_pids >= 0 && setns(init_pids, CLONE_NEWPID) == 0;
}

void leave_init_pids(void)
{
    setns(our_pids, CLONE_NEWPID);
}

static bool join_namespace(const char *kind, int type)
{
    int fd = open_namespace(init_pid, kind);
    bool joined = fd >= 0 && setns(fd, type) == 0;
    close_fd(&fd);
    return joined;
}

const char *join_init_files(void)
{
    if (!init_pid)
        return NULL;
    if (!join_namespace("cgroup", CLONE_NEWCGROUP))
        return "the init's control groups";
    return join_namespace("mnt", CLONE_NEWNS) ? NULL : "the init's mounts";
}

const char *init_cgroup(void)
{
    static char path[512];
    char file[64], text[400];
    snprintf(file, sizeof file, "/proc/%d/cgroup", init_pid);
    if (!init_pid || read_file(file, text, sizeof text) <= 0 || strncmp(text, "0::/", 4) != 0)
        return NULL;
    text[strcspn(text, "\n")] = 0;
    snprintf(path, sizeof path, "/sys/fs/cgroup%s", text + 3);
    return path;
}
