/* Confines the process of a VMM, and executes it.
 *
 *     hypeman-launch [options] -- program arguments…
 *
 * Started as root, as the first process of a PID namespace. In this order:
 *
 *     --cgroup FD      join the control group whose cgroup.procs this is
 *     --net            network, and always mount, IPC and UTS namespaces of its own
 *     --file PATH      the root directory becomes an empty one, with these files and directories, read-only, under
 *     --own PATH       the same names, what it may write to, these devices, and a /proc of the PID namespace
 *     --device PATH
 *     --chdir PATH     its working directory, in its root
 *     --fsize N        bytes that a file may grow to by what it writes
 *     --memlock N      bytes that it may lock in memory
 *     --uid N --gid N  its user and group from here on; --group N: further groups
 *     --jailer         the program confines itself: it may mount, change its root and make namespaces
 *
 * then no new privileges, a seccomp filter, exec. An error is written to --status FD, which exec closes: the reader
 * gets nothing if and only if the program runs. Rules: no allocation, no library beyond the C library, every result is
 * checked, and a failure ends the process.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MAX_GROUPS 32
#define ROOT "/proc" /* a directory that every host has, that has no file of a VMM, and that is replaced anyway */

#ifndef __NR_quotactl_fd
#define __NR_quotactl_fd 443
#endif
#ifndef __NR_mount_setattr
#define __NR_mount_setattr 442
#endif

/* The filter refuses calls of other architectures, whose numbers mean something else. */
#if defined __x86_64__
#define ARCHITECTURE AUDIT_ARCH_X86_64
#define FOREIGN_CALLS 0x40000000 /* numbers of the x32 interface reach the same calls */
#elif defined __aarch64__
#define ARCHITECTURE AUDIT_ARCH_AARCH64
#define FOREIGN_CALLS 0x80000000 /* none */
#else
#error "the filter of system calls is not written for this architecture"
#endif

#define LANDLOCK_CREATE_RULESET 444 /* the same number on all processors */
#define LANDLOCK_RESTRICT_SELF 446

static int status_fd = 2;

static _Noreturn void fail(const char *what, const char *which)
{
    char text[512];
    int length = snprintf(text, sizeof text, "%s%s%s: %s", what, *which ? " " : "", which, strerror(errno));
    if (length > 0)
        (void)!write(status_fd, text, (size_t)length < sizeof text ? (size_t)length : sizeof text - 1);
    _exit(126);
}

/* Calls that no VMM needs, whatever its own filter allows. */
static const int denied[] = {
    __NR_io_uring_setup,
    __NR_io_uring_enter,
    __NR_io_uring_register,
    __NR_perf_event_open,
    __NR_bpf,
    __NR_keyctl,
    __NR_add_key,
    __NR_request_key,
    __NR_userfaultfd,
    __NR_ptrace,
    __NR_process_vm_readv,
    __NR_process_vm_writev,
    __NR_pidfd_getfd,
    __NR_kcmp,
    __NR_kexec_load,
    __NR_kexec_file_load,
    __NR_init_module,
    __NR_finit_module,
    __NR_delete_module,
    __NR_reboot,
    __NR_swapon,
    __NR_swapoff,
    __NR_acct,
    __NR_quotactl,
    __NR_quotactl_fd,
    __NR_syslog,
    __NR_open_by_handle_at,
    __NR_name_to_handle_at,
    __NR_fanotify_init,
    __NR_migrate_pages,
    __NR_move_pages,
    __NR_settimeofday,
    __NR_clock_settime,
    __NR_clock_adjtime,
    __NR_adjtimex,
    __NR_sethostname,
    __NR_setdomainname,
    __NR_vhangup,
#ifdef __x86_64__
    __NR_iopl,
    __NR_ioperm,
    __NR_modify_ldt,
#endif
};

/* What a jailer needs and a VMM does not. */
static const int denied_without_jailer[] = {
    __NR_mount,      __NR_umount2,   __NR_pivot_root, __NR_chroot,   __NR_setns,   __NR_unshare, __NR_mknodat,
    __NR_move_mount, __NR_open_tree, __NR_fsopen,     __NR_fsconfig, __NR_fsmount, __NR_fspick,  __NR_mount_setattr,
#ifdef __NR_mknod /* older architectures only; the others have mknodat alone */
    __NR_mknod,
#endif
};

#define COUNT(array) (sizeof(array) / sizeof *(array))

#define LOAD(field) (struct sock_filter) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define IF(comparison, value, then, otherwise) \
    (struct sock_filter) BPF_JUMP(BPF_JMP | comparison | BPF_K, (__u32)(value), (__u8)(then), (__u8)(otherwise))
#define RETURN(what) (struct sock_filter) BPF_STMT(BPF_RET | BPF_K, what)

static void filter_calls(int jailer)
{
    enum { HEAD = 5, SOCKETS = 5 };
    struct sock_filter code[HEAD + COUNT(denied) + COUNT(denied_without_jailer) + SOCKETS + 2];
    size_t calls = COUNT(denied) + (jailer ? 0 : COUNT(denied_without_jailer)), at = 0;
    size_t refusal = HEAD + calls + SOCKETS + 1; /* a jump counts from the instruction behind it */
    code[at++] = LOAD(arch);
    code[at++] = IF(BPF_JEQ, ARCHITECTURE, 1, 0);
    code[at++] = RETURN(SECCOMP_RET_KILL_PROCESS);
    code[at++] = LOAD(nr);
    code[at] = IF(BPF_JGE, FOREIGN_CALLS, refusal - at - 1, 0), at++;
    for (size_t i = 0; i < calls; i++) {
        int call = i < COUNT(denied) ? denied[i] : denied_without_jailer[i - COUNT(denied)];
        code[at] = IF(BPF_JEQ, call, refusal - at - 1, 0), at++;
    }
    /* Sockets: local ones, and those through which a TAP is configured, which Firecracker does without, and which would
	 * reach the host's services from its namespace. Not vsock, which knows no network namespaces. */
    code[at++] = IF(BPF_JEQ, __NR_socket, 0, 4);
    code[at++] = LOAD(args[0]);
    code[at++] = IF(BPF_JEQ, AF_UNIX, 2, 0);
    code[at++] = IF(BPF_JEQ, jailer ? AF_UNIX : AF_INET, 1, 0);
    code[at++] = RETURN(SECCOMP_RET_ERRNO | EAFNOSUPPORT);
    code[at++] = RETURN(SECCOMP_RET_ALLOW);
    code[at++] = RETURN(SECCOMP_RET_ERRNO | EPERM);
    struct sock_fprog program = {.len = (unsigned short)at, .filter = code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        fail("setting no_new_privs", "");
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0) != 0)
        fail("the filter of system calls", "");
}

static void make_root(void)
{
    if (mount("none", ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=1m,nr_inodes=4096") != 0)
        fail("mount", ROOT);
}

/* Makes the directories above ROOT/path, and what is bound there: a directory or an empty file. */
static void make_target(const char *target, int is_directory)
{
    char part[4096];
    size_t length = strlen(target);
    if (length >= sizeof part) {
        errno = ENAMETOOLONG;
        fail("path", target);
    }
    for (size_t i = sizeof ROOT; i < length; i++)
        if (target[i] == '/') {
            memcpy(part, target, i);
            part[i] = 0;
            if (mkdir(part, 0755) != 0 && errno != EEXIST)
                fail("directory", part);
        }
    if (is_directory) {
        if (mkdir(target, 0755) != 0 && errno != EEXIST)
            fail("directory", target);
    } else {
        int fd = open(target, O_RDONLY | O_NONBLOCK | O_CREAT | O_CLOEXEC, 0444);
        if (fd < 0)
            fail("file", target);
        close(fd);
    }
}

#define READ_ONLY (MS_RDONLY | MS_NODEV)
#define ITS_OWN (MS_NODEV | MS_NOEXEC)
#define DEVICE MS_NOEXEC

static void bind_path(const char *path, unsigned long restrictions)
{
    char target[4096];
    struct stat found;
    unsigned long flags = MS_REMOUNT | MS_BIND | MS_NOSUID | restrictions;
    if (stat(path, &found) != 0)
        fail("file", path);
    if ((size_t)snprintf(target, sizeof target, ROOT "%s", path) >= sizeof target) {
        errno = ENAMETOOLONG;
        fail("path", path);
    }
    make_target(target, S_ISDIR(found.st_mode));
    if (mount(path, target, NULL, MS_BIND, NULL) != 0 || mount(NULL, target, NULL, flags, NULL) != 0)
        fail("bind", path);
}

static void enter_root(void)
{
    unsigned long flags = MS_NOSUID | MS_NODEV | MS_NOEXEC;
    if (mkdir(ROOT "/proc", 0555) != 0 && errno != EEXIST)
        fail("directory", ROOT "/proc");
    /* Linux 5.8: processes alone, and nothing of the host's */
    if (mount("proc", ROOT "/proc", "proc", flags, "subset=pid") != 0
        && mount("proc", ROOT "/proc", "proc", flags, NULL) != 0)
        fail("mount", ROOT "/proc");
    if (chdir(ROOT) != 0 || syscall(__NR_pivot_root, ".", ".") != 0)
        fail("changing the root", "");
    if (umount2(".", MNT_DETACH) != 0 || chdir("/") != 0)
        fail("leaving the host's root", "");
    if (mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV, NULL) != 0)
        fail("closing the root", "");
}

/* Abstract sockets belong to a network namespace: no connection to those of the host, for one that is in the host's.
 * Without effect before Linux 6.12. */
static void leave_abstract_sockets(void)
{
    struct {
        unsigned long long files, ports, scopes;
    } rules = {0, 0, 1 /* LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET */};
    if (syscall(LANDLOCK_CREATE_RULESET, NULL, 0, 1 /* its version */) < 6)
        return;
    int ruleset = (int)syscall(LANDLOCK_CREATE_RULESET, &rules, sizeof rules, 0);
    if (ruleset < 0 || syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0) != 0)
        fail("landlock", "");
    close(ruleset);
}

static unsigned long long number(const char *text)
{
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (errno != 0 || *end || end == text) {
        errno = EINVAL;
        fail("number", text);
    }
    return value;
}

static void limit(int resource, unsigned long long value, const char *name)
{
    struct rlimit both = {value, value};
    if (value != 0 && setrlimit(resource, &both) != 0)
        fail("limit of", name);
}

int main(int argc, char **argv)
{
    unsigned long long fsize = 0, memlock = 0;
    uid_t uid = 0;
    gid_t gid = 0, groups[MAX_GROUPS];
    size_t group_count = 0;
    int cgroup = -1, net = 0, jailer = 0, root = 0, at = 1;
    const char *directory = "";

    for (; at < argc && strcmp(argv[at], "--") != 0; at++) {
        const char *option = argv[at];
        if (strcmp(option, "--net") == 0)
            net = CLONE_NEWNET;
        else if (strcmp(option, "--jailer") == 0)
            jailer = 1;
        else if (at + 1 == argc) {
            errno = EINVAL;
            fail("option", option);
        } else if (strcmp(option, "--status") == 0)
            status_fd = (int)number(argv[++at]);
        else if (strcmp(option, "--cgroup") == 0)
            cgroup = (int)number(argv[++at]);
        else if (strcmp(option, "--fsize") == 0)
            fsize = number(argv[++at]);
        else if (strcmp(option, "--memlock") == 0)
            memlock = number(argv[++at]);
        else if (strcmp(option, "--uid") == 0)
            uid = (uid_t)number(argv[++at]);
        else if (strcmp(option, "--gid") == 0)
            gid = (gid_t)number(argv[++at]);
        else if (strcmp(option, "--group") == 0 && group_count < MAX_GROUPS)
            groups[group_count++] = (gid_t)number(argv[++at]);
        else if (strcmp(option, "--file") == 0 || strcmp(option, "--own") == 0 || strcmp(option, "--device") == 0)
            root = 1, at++;
        else if (strcmp(option, "--chdir") == 0)
            directory = argv[++at];
        else {
            errno = EINVAL;
            fail("option", option);
        }
    }
    if (at + 1 >= argc) {
        errno = EINVAL;
        fail("program", "");
    }
    if (fcntl(status_fd, F_SETFD, FD_CLOEXEC) != 0)
        fail("status", "");
    if (cgroup >= 0) {
        if (write(cgroup, "0", 1) != 1)
            fail("control group", "");
        close(cgroup);
    }
    if (unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS | net) != 0)
        fail("namespaces", "");
    if (!net)
        leave_abstract_sockets();
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0)
        fail("mounts of its own", "");
    if (sethostname("vmm", 3) != 0)
        fail("host name", "");
    umask(022);
    if (root)
        make_root();
    for (int i = 1; i < at; i++) {
        if (strcmp(argv[i], "--file") == 0)
            bind_path(argv[++i], READ_ONLY);
        else if (strcmp(argv[i], "--own") == 0)
            bind_path(argv[++i], ITS_OWN);
        else if (strcmp(argv[i], "--device") == 0)
            bind_path(argv[++i], DEVICE);
    }
    if (root)
        enter_root();
    umask(077);
    limit(RLIMIT_FSIZE, fsize, "file sizes");
    limit(RLIMIT_MEMLOCK, memlock, "locked memory");
    if (uid != 0
        && (setgroups(group_count, groups) != 0 || setresgid(gid, gid, gid) != 0 || setresuid(uid, uid, uid) != 0))
        fail("changing the user", "");
    if (*directory && chdir(directory) != 0)
        fail("working directory", directory);
    filter_calls(jailer);
    execv(argv[at + 1], argv + at + 1);
    fail("program", argv[at + 1]);
}
