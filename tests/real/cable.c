/*
 * The network link of a VM without a VM: carries frames between the host's TAP and `eth0` of a network namespace that
 * plays the guest. Its process stands for the VMM: SIGSTOP pauses it, SIGKILL ends it.
 *
 *     cable TAP NAMESPACE RUN_DIR      prints a line when it is connected, and stops itself; SIGCONT lets it begin
 *
 * RUN_DIR is only there to be found in its command line.
 */

#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

static char frame[1 << 17];

static int opened(const char *name)
{
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC), tries = 1000;

    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    while (fd < 0 || ioctl(fd, TUNSETIFF, &request)) { /* the previous one may still be ending */
        if (!tries--) {
            perror(name);
            exit(1);
        }
        usleep(1000);
    }
    return fd;
}

static void carry(int from, int to)
{
    ssize_t size;

    while ((size = read(from, frame, sizeof frame)) > 0)
        if (to >= 0 && write(to, frame, size) < 0)
            continue; /* a link that is down */
}

int main(int count, char **arguments)
{
    struct pollfd ends[2] = {{.events = POLLIN}, {.events = POLLIN}};
    int namespace;

    if (count != 4)
        return 2;
    ends[0].fd = opened(arguments[1]);
    namespace = open(arguments[2], O_RDONLY | O_CLOEXEC);
    if (namespace < 0 || setns(namespace, CLONE_NEWNET)) {
        perror(arguments[2]);
        return 1;
    }
    ends[1].fd = opened("eth0");
    puts("connected");
    fclose(stdout);
    raise(SIGSTOP);
    carry(ends[1].fd, -1); /* a guest that does not run sends nothing */
    for (;;) {
        if (poll(ends, 2, -1) < 0)
            continue;
        if ((ends[0].revents | ends[1].revents) & (POLLERR | POLLHUP | POLLNVAL))
            pause(); /* its TAP was removed: a VMM lives on, too */
        carry(ends[0].fd, ends[1].fd);
        carry(ends[1].fd, ends[0].fd);
    }
}
