/* The whole user space of a test guest: process 1 that answers one-line questions on the agent port.
 *
 * It is no agent; it shows whether the *VMM* did its work. A question is a line, the answer is a line:
 *
 *   ping <text>      pong <text>                    the channel carries bytes both ways
 *   count            a number that only rises       memory went along with a capture
 *   keep <text>      kept                           keeps text in memory
 *   kept             the text kept
 *   disks            serial:sectors ...             which disks the guest sees
 *   read <serial>    first 16 bytes of that disk
 *   write <serial> <text>   wrote                   to the first sector, through to the device
 *   memory           kB that the kernel has
 *   free             kB of it that nobody uses
 *   link             brings eth0 up and tells its carrier: 0, 1 or none
 *   mac              address of eth0
 *   poweroff reboot panic   (no answer)
 *
 * It answers at the virtio-serial port, or dials the host by vsock where a VMM has no such port. The command line
 * makes up for what a VMM has not: disks=root,overlay are their names in order, poweroff=reset is how to end.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#define AGENT_VSOCK_PORT 1024
#define HOPELESS 2000 /* looks for a way to the host, 2 ms apart */

static volatile unsigned long counter;

/* Those of the initrd, which lists them in the order in which they need each other; none where all is built in. */
static void load_modules(void)
{
    char name[256], path[300];
    FILE *order = fopen("/modules/order", "r");
    while (order != NULL && fgets(name, sizeof name, order) != NULL) {
        name[strcspn(name, "\n")] = 0;
        snprintf(path, sizeof path, "/modules/%s", name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (syscall(SYS_finit_module, fd, "", 0) != 0)
            printf("test guest: %s cannot be loaded: %m\n", path);
        close(fd);
    }
    if (order != NULL)
        fclose(order);
}

static void *count(void *arg)
{
    for (;; counter++)
        usleep(10000);
    return arg;
}

static void line_of(const char *path, int number, char *line, size_t size)
{
    FILE *file = fopen(path, "r");
    line[0] = 0;
    for (int seen = 0; file != NULL && seen < number; seen++)
        if (fgets(line, (int)size, file) == NULL) {
            line[0] = 0;
            break;
        }
    if (file != NULL)
        fclose(file);
    line[strcspn(line, "\n")] = 0;
}

static void first_line(const char *path, char *line, size_t size)
{
    line_of(path, 1, line, size);
}

static bool told(const char *word)
{
    char line[2048];
    first_line("/proc/cmdline", line, sizeof line);
    return strstr(line, word) != NULL;
}

/* The name that the command line has for the disk "vda", "vdb" ..., if it names disks. */
static void ordered_name(const char *name, char *serial, size_t size)
{
    char line[2048];
    first_line("/proc/cmdline", line, sizeof line);
    char *word = strstr(line, "disks=");
    if (word == NULL)
        return;
    word[strcspn(word, " ")] = 0;
    word = strtok(word + strlen("disks="), ",");
    for (char disk = 'a'; word != NULL && disk < name[2]; disk++)
        word = strtok(NULL, ",");
    snprintf(serial, size, "%s", word != NULL ? word : "");
}

/* Calls back for every virtio disk with its kernel name and serial number. */
static void each_disk(void (*then)(const char *name, const char *serial, void *arg), void *arg)
{
    DIR *block = opendir("/sys/block");
    struct dirent *entry;
    while (block != NULL && (entry = readdir(block)) != NULL) {
        char path[300], serial[64];
        if (strncmp(entry->d_name, "vd", 2) != 0)
            continue;
        snprintf(path, sizeof path, "/sys/block/%s/serial", entry->d_name);
        first_line(path, serial, sizeof serial);
        ordered_name(entry->d_name, serial, sizeof serial);
        then(entry->d_name, serial, arg);
    }
    closedir(block);
}

static void tell_disk(const char *name, const char *serial, void *answer)
{
    char path[300], size[32];
    snprintf(path, sizeof path, "/sys/block/%s/size", name);
    first_line(path, size, sizeof size);
    sprintf((char *)answer + strlen(answer), "%s:%s ", serial, size);
}

struct lookup {
    const char *serial;
    char path[64];
};

static void find_disk(const char *name, const char *serial, void *arg)
{
    struct lookup *lookup = arg;
    if (strcmp(serial, lookup->serial) == 0)
        snprintf(lookup->path, sizeof lookup->path, "/dev/%.50s", name);
}

static void sector(char *serial, const char *text, char *answer)
{
    static char buffer[4096] __attribute__((aligned(4096)));
    struct lookup lookup = {.serial = serial};
    each_disk(find_disk, &lookup);
    int fd = open(lookup.path, (text != NULL ? O_RDWR : O_RDONLY) | O_DIRECT | O_SYNC);
    if (fd < 0 || read(fd, buffer, sizeof buffer) != sizeof buffer) {
        sprintf(answer, "error %m");
    } else if (text == NULL) {
        snprintf(answer, 17, "%s", buffer);
    } else {
        snprintf(buffer, 17, "%s", text);
        sprintf(answer, pwrite(fd, buffer, sizeof buffer, 0) == sizeof buffer ? "wrote" : "error %m");
    }
    if (fd >= 0)
        close(fd);
}

static void online_memory(void)
{
    DIR *memory = opendir("/sys/devices/system/memory");
    struct dirent *entry;
    while (memory != NULL && (entry = readdir(memory)) != NULL) {
        char path[300];
        snprintf(path, sizeof path, "/sys/devices/system/memory/%s/state", entry->d_name);
        int fd = open(path, O_WRONLY);
        if (fd >= 0) {
            if (write(fd, "online_movable", 14) < 0) {
                /* already online */
            }
            close(fd);
        }
    }
    closedir(memory);
}

static void bring_up(const char *name)
{
    struct ifreq request = {.ifr_flags = IFF_UP};
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", name);
    ioctl(fd, SIOCSIFFLAGS, &request);
    close(fd);
}

static void answer_to(char *question, char *answer)
{
    static char kept[200];
    char *rest = strchr(question, ' ');
    if (rest != NULL)
        *rest++ = 0;
    else
        rest = "";
    answer[0] = 0;
    if (strcmp(question, "ping") == 0)
        sprintf(answer, "pong %s", rest);
    else if (strcmp(question, "count") == 0)
        sprintf(answer, "%lu", counter);
    else if (strcmp(question, "keep") == 0) {
        snprintf(kept, sizeof kept, "%s", rest);
        strcpy(answer, "kept");
    } else if (strcmp(question, "kept") == 0)
        strcpy(answer, kept);
    else if (strcmp(question, "disks") == 0)
        each_disk(tell_disk, answer);
    else if (strcmp(question, "read") == 0)
        sector(rest, NULL, answer);
    else if (strcmp(question, "write") == 0) {
        char *text = strchr(rest, ' ');
        *text++ = 0;
        sector(rest, text, answer);
    } else if (strcmp(question, "memory") == 0) {
        online_memory();
        first_line("/proc/meminfo", answer, 100);
    } else if (strcmp(question, "free") == 0) {
        line_of("/proc/meminfo", 2, answer, 100);
    } else if (strcmp(question, "link") == 0) {
        bring_up("eth0");
        first_line("/sys/class/net/eth0/carrier", answer, 100);
        if (answer[0] == 0)
            strcpy(answer, "none");
    } else if (strcmp(question, "mac") == 0)
        first_line("/sys/class/net/eth0/address", answer, 100);
    else if (strcmp(question, "poweroff") == 0)
        reboot(told("poweroff=reset") ? RB_AUTOBOOT : RB_POWER_OFF);
    else if (strcmp(question, "reboot") == 0)
        reboot(RB_AUTOBOOT);
    else if (strcmp(question, "panic") == 0)
        exit(1); /* the end of process 1 is a panic */
    else
        strcpy(answer, "what?");
    strcat(answer, "\n");
}

static int find_port(void)
{
    int port = -1;
    DIR *ports = opendir("/sys/class/virtio-ports");
    struct dirent *entry;
    while (port < 0 && ports != NULL && (entry = readdir(ports)) != NULL) {
        char path[300], name[64];
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
        first_line(path, name, sizeof name);
        snprintf(path, sizeof path, "/dev/%s", entry->d_name);
        if (strcmp(name, "hypeman.agent") == 0)
            port = open(path, O_RDWR | O_CLOEXEC);
    }
    if (ports != NULL)
        closedir(ports);
    return port;
}

static int dial_host(bool *possible)
{
    struct sockaddr_vm host = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = AGENT_VSOCK_PORT};
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    *possible = fd >= 0 || errno != EAFNOSUPPORT;
    if (fd >= 0 && connect(fd, (struct sockaddr *)&host, sizeof host) == 0)
        return fd;
    if (fd >= 0)
        close(fd);
    return -1;
}

/* Where questions come from; tells whether it is a connection, which may end. A guest that cannot have one ends its VM:
 * nobody is to wait for it. */
static int open_channel(bool *dialled)
{
    bool possible;
    for (int fd, hopeless = 0; hopeless < HOPELESS; hopeless = possible ? 0 : hopeless + 1) {
        *dialled = false;
        if ((fd = find_port()) >= 0)
            return fd;
        *dialled = true;
        if ((fd = dial_host(&possible)) >= 0)
            return fd;
        usleep(2000);
    }
    printf("test guest: the kernel has no port for the agent and no vsock\n");
    exit(1);
}

int main(void)
{
    static char question[4096], answer[4096];
    size_t have = 0;
    pthread_t counting;

    mkdir("/proc", 0755);
    mkdir("/sys", 0755);
    mkdir("/dev", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    load_modules();
    mount("sys", "/sys", "sysfs", 0, NULL);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    pthread_create(&counting, NULL, count, NULL);

    int console = open("/dev/console", O_WRONLY);
    dprintf(console, "test guest is up\n");
    bool dialled;
    int port = open_channel(&dialled);
    for (;;) {
        ssize_t got = read(port, question + have, sizeof question - 1 - have);
        if (got <= 0) { /* nobody is connected on the host's side */
            usleep(2000);
            have = 0;
            if (dialled) {
                close(port);
                port = open_channel(&dialled);
            }
            continue;
        }
        have += (size_t)got;
        char *end;
        while ((end = memchr(question, '\n', have)) != NULL) {
            *end = 0;
            size_t used = (size_t)(end + 1 - question);
            answer_to(question, answer);
            for (size_t sent = 0, size = strlen(answer); sent < size;) {
                ssize_t n = write(port, answer + sent, size - sent);
                if (n <= 0)
                    break;
                sent += (size_t)n;
            }
            memmove(question, question + used, have - used);
            have -= used;
        }
        if (have == sizeof question - 1)
            have = 0;
    }
}
