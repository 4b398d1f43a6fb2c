/* See confine.h. In this order: limits, memory, namespaces with an empty root, user and capabilities, no_new_privs, not
 * dumpable, the filter of system calls.
 *
 * The filter lists what is allowed. Anything else fails with EPERM instead of killing, so that a C library that tries a
 * newer call first falls back to the older one. In particular there is no open, exec, fork, kill, bind, listen, ptrace
 * and no unix socket: what the engine reaches are the descriptors it was given and TCP and UDP of its network
 * namespace.
 */
#define _GNU_SOURCE
#include "confine.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined __x86_64__
#define ARCHITECTURE AUDIT_ARCH_X86_64
#elif defined __aarch64__
#define ARCHITECTURE AUDIT_ARCH_AARCH64
#else
#error "the filter of system calls is not written for this architecture"
#endif

#ifndef MCL_ONFAULT
#define MCL_ONFAULT 4
#endif

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (uint32_t)offsetof(struct seccomp_data, field))
#define ARGUMENT(i) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (uint32_t)(offsetof(struct seccomp_data, args) + 8 * (i)))
#define ALLOW BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
#define REFUSE(code) BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (code))
#define IF_EQUAL(value, skip_then, skip_else) \
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)(value), skip_then, skip_else)
#define IF_BITS(value, skip_then, skip_else) \
    BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, (uint32_t)(value), skip_then, skip_else)

static const int allowed[] = {
    /* sockets that exist */
    __NR_recvfrom,
    __NR_recvmsg,
    __NR_sendto,
    __NR_sendmsg,
    __NR_accept4,
    __NR_connect,
    __NR_shutdown,
    __NR_getsockname,
    __NR_getpeername,
    __NR_getsockopt,
    __NR_read,
    __NR_write,
    __NR_readv,
    __NR_writev,
    __NR_close,
    __NR_splice,
    __NR_fstat,
    __NR_lseek,
    __NR_dup,
    /* waiting */
    __NR_epoll_pwait,
    __NR_epoll_ctl,
    __NR_epoll_create1,
    __NR_ppoll,
    __NR_eventfd2,
    __NR_pipe2,
    __NR_futex,
    __NR_clock_nanosleep,
    __NR_nanosleep,
    __NR_sched_yield,
    /* memory; see below for mappings */
    __NR_munmap,
    __NR_mremap,
    __NR_madvise,
    __NR_brk,
    __NR_mlock,
    __NR_mlock2,
    __NR_munlock,
    /* time and randomness */
    __NR_clock_gettime,
    __NR_clock_getres,
    __NR_gettimeofday,
    __NR_getrandom,
    /* about itself */
    __NR_getpid,
    __NR_gettid,
    __NR_getuid,
    __NR_geteuid,
    __NR_getgid,
    __NR_getegid,
    __NR_getrusage,
    __NR_sysinfo,
    __NR_sched_getaffinity,
    __NR_set_robust_list,
    __NR_set_tid_address,
    __NR_rt_sigaction,
    __NR_rt_sigprocmask,
    __NR_rt_sigreturn,
    __NR_sigaltstack,
    __NR_restart_syscall,
    __NR_exit,
    __NR_exit_group,
#ifdef __NR_rseq
    __NR_rseq,
#endif
#ifdef __NR_epoll_wait
    __NR_epoll_wait,
#endif
#ifdef __NR_poll
    __NR_poll,
#endif
};

/* Options that may be set: level and name. */
static const int options[][2] = {
    {SOL_SOCKET, SO_LINGER},
    {IPPROTO_TCP, TCP_NODELAY},
    {IPPROTO_TCP, TCP_DEFER_ACCEPT},
};

static const int fcntls[] = {F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC};

#define COUNT(array) (sizeof(array) / sizeof *(array))

struct program {
    struct sock_filter code[256];
    unsigned short n;
};

static void add(struct program *p, const struct sock_filter *code, unsigned n)
{
    memcpy(p->code + p->n, code, n * sizeof *code);
    p->n = (unsigned short)(p->n + n);
}

#define ADD(p, ...)                                       \
    do {                                                  \
        const struct sock_filter piece[] = {__VA_ARGS__}; \
        add(p, piece, COUNT(piece));                      \
    } while (0)

/* Runs `...` if the call is this one; it must end in a verdict. */
#define CALL(p, number, ...)                             \
    do {                                                 \
        const struct sock_filter body[] = {__VA_ARGS__}; \
        ADD(p, IF_EQUAL(number, 0, COUNT(body)));        \
        add(p, body, COUNT(body));                       \
    } while (0)

static void build(struct program *p)
{
    p->n = 0;
    ADD(p, LOAD(arch), IF_EQUAL(ARCHITECTURE, 1, 0), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS), LOAD(nr));
    for (size_t i = 0; i < COUNT(allowed); i++)
        ADD(p, IF_EQUAL(allowed[i], 0, 1), ALLOW);
    /* memory that can be executed was mapped before */
    CALL(p, __NR_mmap, ARGUMENT(2), IF_BITS(PROT_EXEC, 0, 1), REFUSE(EPERM), ALLOW);
    CALL(p, __NR_mprotect, ARGUMENT(2), IF_BITS(PROT_EXEC, 0, 1), REFUSE(EPERM), ALLOW);
    /* TCP, and UDP to ask the kernel for a source address: never unix, netlink, raw or packet sockets */
    CALL(p, __NR_socket, ARGUMENT(0), IF_EQUAL(AF_INET, 1, 0), IF_EQUAL(AF_INET6, 0, 6), ARGUMENT(2), IF_EQUAL(0, 0, 4),
         ARGUMENT(1), BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 0xf), IF_EQUAL(SOCK_STREAM, 2, 0), IF_EQUAL(SOCK_DGRAM, 1, 0),
         REFUSE(EPERM), ALLOW);
    for (size_t i = 0; i < COUNT(options); i++)
        CALL(p, __NR_setsockopt, ARGUMENT(1), IF_EQUAL(options[i][0], 0, 3), ARGUMENT(2), IF_EQUAL(options[i][1], 0, 1),
             ALLOW, LOAD(nr));
    for (size_t i = 0; i < COUNT(fcntls); i++)
        CALL(p, __NR_fcntl, ARGUMENT(1), IF_EQUAL(fcntls[i], 0, 1), ALLOW, LOAD(nr));
    CALL(p, __NR_ioctl, ARGUMENT(1), IF_EQUAL(FIONBIO, 0, 1), ALLOW, REFUSE(EPERM));
    /* threads, not processes; the C library falls back from clone3, whose flags no filter can see */
    CALL(p, __NR_clone, ARGUMENT(0), IF_BITS(CLONE_THREAD, 1, 0), REFUSE(EPERM), ALLOW);
#ifdef __NR_clone3
    CALL(p, __NR_clone3, REFUSE(ENOSYS));
#endif
    CALL(p, __NR_tgkill, ARGUMENT(0), IF_EQUAL(getpid(), 0, 1), ALLOW, REFUSE(EPERM)); /* abort() */
    /* its own limits, to read */
    CALL(p, __NR_prlimit64, ARGUMENT(0), IF_EQUAL(0, 0, 3), ARGUMENT(2), IF_EQUAL(0, 0, 1), ALLOW, REFUSE(EPERM));
    ADD(p, REFUSE(EPERM));
}

static bool filter_calls(void)
{
    static struct program p;
    build(&p);
    struct sock_fprog program = {.len = p.n, .filter = p.code};
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0) == 0;
}

/* A mount namespace of its own, whose root is empty and read-only. */
static bool empty_root(void)
{
    static const char PLACE[] = "/proc"; /* a directory that every host has */
    return unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS) == 0
        && mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0
        && mount("none", PLACE, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0555,size=4k,nr_inodes=1") == 0
        && chdir(PLACE) == 0 && syscall(__NR_pivot_root, ".", ".") == 0 && umount2(".", MNT_DETACH) == 0
        && chdir("/") == 0
        && mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) == 0;
}

static bool drop_capabilities(void)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct none[2];
    memset(none, 0, sizeof none);
    (void)prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    return syscall(__NR_capset, &header, none) == 0;
}

static void drop_bounds(void)
{
    for (int i = 0; i <= 63; i++)
        (void)prctl(PR_CAPBSET_DROP, i, 0, 0, 0); /* fails beyond the last one, and without CAP_SETPCAP */
}

static bool switch_user(unsigned uid)
{
    return setgroups(0, NULL) == 0 && setresgid(uid, uid, uid) == 0 && setresuid(uid, uid, uid) == 0;
}

static bool memory_is_unlimited(void)
{
    struct rlimit now;
    return getrlimit(RLIMIT_MEMLOCK, &now) == 0 && now.rlim_cur == RLIM_INFINITY;
}

bool confine(unsigned uid, int *locked, char *error, size_t n)
{
    struct rlimit none = {0, 0}, unlimited = {RLIM_INFINITY, RLIM_INFINITY}, files;
    bool root = geteuid() == 0;
    const char *what = NULL;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        (void)setrlimit(RLIMIT_NOFILE, &files);
    }
    /* On fault: what is used is locked, not all of every thread's stack. With a limit, memory would end there; policies
     * are locked one by one in any case. */
    *locked = (setrlimit(RLIMIT_MEMLOCK, &unlimited) == 0 || memory_is_unlimited())
        && mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) == 0;
    if (setrlimit(RLIMIT_CORE, &none) != 0)
        what = "limit of core files";
    else if (root && !empty_root())
        what = "an empty root directory";
    if (!what && root) {
        drop_bounds();
        if (uid && !switch_user(uid))
            what = "changing the user";
    }
    if (!what && !drop_capabilities())
        what = "dropping capabilities";
    else if (!what && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        what = "setting no_new_privs";
    else if (!what && prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0)
        what = "forbidding core dumps";
    else if (!what && !filter_calls())
        what = "the filter of system calls";
    if (what)
        (void)snprintf(error, n, "%s: %s", what, strerror(errno));
    return !what;
}
