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

const char *make_init_namespaces(void) {
    if (unshare(CLONE_NEWNS | CLONE_NEWCGROUP) < 0)
        return "namespaces";
    if (mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL) < 0)
        return "mount propagation";
    umount2("/proc", MNT_DETACH);
    if (mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0)
        return "/proc";
    umount2("/sys/fs/cgroup", MNT_DETACH);
    if (mount("cgroup2", "/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0)
        return "/sys/fs/cgroup";
    return NULL;
}

static int open_namespace(pid_t pid, const char *kind) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/ns/%s", pid, kind);
    return open(path, O_RDONLY | O_CLOEXEC);
}

void remember_init(pid_t pid) {
    init_pid = pid;
    our_pids = open_namespace(getpid(), "pid");
    init_pids = open_namespace(pid, "pid");
}

bool join_init_pids(void) { return init_pids >= 0 && setns(init_pids, CLONE_NEWPID) == 0; }

void leave_init_pids(void) { setns(our_pids, CLONE_NEWPID); }

const char *join_init_files(void) {
    if (!init_pid)
        return NULL;
    int mounts = open_namespace(init_pid, "mnt");
    bool joined = mounts >= 0 && setns(mounts, CLONE_NEWNS) == 0;
    close_fd(&mounts);
    return joined ? NULL : "the init's mounts";
}
