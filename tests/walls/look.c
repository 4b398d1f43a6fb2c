/* Says what it can open, list, write and connect to, and who it is: started by a driver in the place of its VMM.
 *
 * Under the name `jailer` it is Firecracker's: it makes the root directory of the program as the real one does
 * (Firecracker's documents say how), and becomes the program in there.
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <net/if.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <unistd.h>

static const char *kind_of(mode_t mode)
{
    return S_ISDIR(mode) ? "directory"
        : S_ISREG(mode)  ? "file"
        : S_ISLNK(mode)  ? "link"
        : S_ISCHR(mode)  ? "device"
        : S_ISBLK(mode)  ? "block device"
        : S_ISSOCK(mode) ? "socket"
        : S_ISFIFO(mode) ? "FIFO"
                         : "something";
}

static void walk(const char *directory)
{
    DIR *list = opendir(directory);
    if (list == NULL) {
        dprintf(2, "cannot be listed: %s\n", directory);
        return;
    }
    for (struct dirent *entry; (entry = readdir(list)) != NULL;) {
        char path[4096];
        struct stat found;
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        snprintf(path, sizeof path, "%s/%s", strcmp(directory, "/") == 0 ? "" : directory, entry->d_name);
        if (lstat(path, &found) != 0 || strcmp(path, "/proc") == 0)
            continue;
        int link = S_ISLNK(found.st_mode);
        int fd = link ? -1 : open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
        const char *read = fd >= 0 ? " read" : "";
        const char *write = !link && access(path, W_OK) == 0 ? " write" : "";
        dprintf(2, "%s%s%s %s\n", kind_of(found.st_mode), read, write, path);
        if (fd >= 0)
            close(fd);
        if (S_ISDIR(found.st_mode))
            walk(path);
    }
    closedir(list);
}

static void list_descriptors(void)
{
    static const char *const access[] = {"read", "write", "read write", "path"};
    for (int fd = 0; fd < 1024; fd++) {
        struct stat found;
        char path[64], target[4096] = "";
        int flags = fcntl(fd, F_GETFL);
        if (flags < 0 || fstat(fd, &found) != 0)
            continue;
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        if (readlink(path, target, sizeof target - 1) < 0)
            target[0] = 0;
        char *colon = strchr(target, ':'); /* socket:[number] */
        if (colon != NULL && colon[1] == '[')
            *colon = 0;
        dprintf(2, "%s %s %s\n", kind_of(found.st_mode), access[flags & O_PATH ? 3 : flags & O_ACCMODE], target);
    }
}

static void list_sockets(const char *abstract)
{
    static const char *const families[] = {[AF_UNIX] = "AF_UNIX",       [AF_INET] = "AF_INET",
                                           [AF_INET6] = "AF_INET6",     [AF_NETLINK] = "AF_NETLINK",
                                           [AF_PACKET] = "AF_PACKET",   [AF_VSOCK] = "AF_VSOCK",
                                           [AF_ALG] = "AF_ALG",         [AF_TIPC] = "AF_TIPC",
                                           [AF_KEY] = "AF_KEY",         [AF_BLUETOOTH] = "AF_BLUETOOTH",
                                           [AF_QIPCRTR] = "AF_QIPCRTR", [44] = "AF_XDP"};
    for (int family = 0; family < (int)(sizeof families / sizeof *families); family++)
        for (int kind = SOCK_STREAM; kind <= SOCK_SEQPACKET && families[family] != NULL; kind++) {
            int fd = socket(family, kind | SOCK_CLOEXEC, 0);
            if (fd >= 0) {
                dprintf(2, "socket of %s\n", families[family]);
                close(fd);
                break;
            }
        }
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    for (int index = 1; index < 256; index++) {
        struct ifreq name = {.ifr_ifindex = index};
        if (ioctl(fd, SIOCGIFNAME, &name) == 0)
            dprintf(2, "interface %s\n", name.ifr_name);
    }
    close(fd);
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    size_t length = strlen(abstract);
    memcpy(to.sun_path + 1, abstract, length);
    fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (connect(fd, (struct sockaddr *)&to, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + length)) == 0)
        dprintf(2, "abstract sockets of the host\n");
    close(fd);
}

static void look(void)
{
    char line[4096];
    dprintf(2, "# what is there\n");
    walk("/");
    dprintf(2, "# in /proc\n");
    DIR *proc = opendir("/proc");
    for (struct dirent *entry; proc != NULL && (entry = readdir(proc)) != NULL;)
        if (entry->d_name[0] != '.')
            dprintf(2, "/proc/%s\n", entry->d_name);
    if (proc != NULL)
        closedir(proc);
    dprintf(2, "# processes that signals reach\n");
    for (int pid = 1; pid < 4194304; pid++)
        if (kill(pid, 0) == 0 || errno != ESRCH)
            dprintf(2, "%d%s\n", pid, pid == getpid() ? " (itself)" : "");
    dprintf(2, "# descriptors\n");
    list_descriptors();
    dprintf(2, "# sockets\n");
    list_sockets("hypeman-test-look");
    dprintf(2, "# privileges\n");
    gethostname(line, sizeof line);
    dprintf(2, "host name %s\n", line);
    for (int i = 0; i < 64; i++) {
        struct {
            unsigned version;
            int pid;
        } head = {0x20080522, 0};
        struct {
            unsigned effective, permitted, inheritable;
        } sets[2] = {{0, 0, 0}, {0, 0, 0}};
        syscall(SYS_capget, &head, sets);
        if ((sets[i / 32].effective | sets[i / 32].permitted | sets[i / 32].inheritable) >> i % 32 & 1)
            dprintf(2, "capability %d\n", i);
    }
    dprintf(2, "new privileges %s\n", prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1 ? "never" : "possible");
    dprintf(2, "groups %d\n", getgroups(0, NULL));
    dprintf(2, "user %s\n", getuid() && geteuid() && getgid() && getegid() ? "its own" : "root");
    /* last, since without a filter it would end us */
    dprintf(2, "filter of system calls %s\n", prctl(PR_GET_SECCOMP, 0, 0, 0, 0) == 2 ? "yes" : "no");
    _exit(1);
}

static void copy(const char *from, const char *to)
{
    static char data[1 << 20];
    int in = open(from, O_RDONLY | O_CLOEXEC), out = open(to, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0700);
    for (ssize_t count; (count = read(in, data, sizeof data)) > 0;)
        if (write(out, data, (size_t)count) != count)
            exit(3);
    close(in);
    close(out);
}

static int jail(char **argv)
{
    const char *id = "", *program = "", *base = "";
    uid_t uid = 0;
    gid_t gid = 0;
    char root[4096], inside[300];
    for (argv++; *argv != NULL && strcmp(*argv, "--") != 0; argv += 2)
        if (strcmp(argv[0], "--id") == 0)
            id = argv[1];
        else if (strcmp(argv[0], "--exec-file") == 0)
            program = argv[1];
        else if (strcmp(argv[0], "--chroot-base-dir") == 0)
            base = argv[1];
        else if (strcmp(argv[0], "--uid") == 0)
            uid = (uid_t)atoi(argv[1]);
        else if (strcmp(argv[0], "--gid") == 0)
            gid = (gid_t)atoi(argv[1]);
    const char *name = strrchr(program, '/') + 1;
    snprintf(root, sizeof root, "%s/%s/%s/root", base, name, id);
    snprintf(inside, sizeof inside, "/%s", name);
    umask(0);
    for (int fd = 3; fd < 1024; fd++)
        close(fd);
    if (chdir(root) != 0 || chmod(".", 0700) != 0)
        exit(2);
    copy(program, name);
    if (chroot(".") != 0 || mkdir("/dev", 0700) != 0 || mkdir("/dev/net", 0700) != 0
        || mknod("/dev/kvm", S_IFCHR | 0600, makedev(10, 232)) != 0
        || mknod("/dev/net/tun", S_IFCHR | 0600, makedev(10, 200)) != 0
        || mknod("/dev/urandom", S_IFCHR | 0600, makedev(1, 9)) != 0)
        exit(3);
    static const char *const given[] = {"/", "/dev", "/dev/net", "/dev/kvm", "/dev/net/tun", "/dev/urandom"};
    for (size_t i = 0; i < sizeof given / sizeof *given; i++)
        if (chown(given[i], uid, gid) != 0)
            exit(4);
    if (chown(inside, uid, gid) != 0 || setgroups(0, NULL) != 0 || setresgid(gid, gid, gid) != 0
        || setresuid(uid, uid, uid) != 0)
        exit(5);
    char *none[] = {NULL}, *arguments[] = {inside, NULL};
    execve(inside, arguments, none);
    return 6;
}

int main(int argc, char **argv)
{
    const char *slash = strrchr(argv[0], '/'), *name = slash ? slash + 1 : argv[0];
    int asked = argc > 1 && strcmp(argv[1], "--version") == 0;
    if (argc > 2 && strcmp(argv[1], "-L") == 0 && strcmp(argv[2], "help") == 0)
        printf("/usr/share/qemu\n/usr/share/seabios\n");
    else if (argc > 2 && strcmp(argv[1], "-machine") == 0 && strcmp(argv[2], "help") == 0)
        printf("pc-q35-7.2 the machine of our driver\n");
    else if (asked && strstr(name, "jailer"))
        printf("Jailer v1.16.1\n");
    else if (asked && strstr(name, "cloud"))
        printf("cloud-hypervisor v53.0\n");
    else if (asked && strstr(name, "firecracker"))
        printf("Firecracker v1.16.1\n");
    else if (asked)
        printf("QEMU emulator version 7.2.0\n");
    else if (strstr(name, "jailer"))
        return jail(argv);
    else
        look();
    return 0;
}
