/* Sends Ethernet frames that no network stack would: on stdin, each after two bytes of length. Runs inside a guest:
 * frame eth0 < frames */
#include <linux/if_packet.h>
#include <net/if.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    int fd = socket(AF_PACKET, SOCK_RAW, 0);
    struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_ifindex = argc > 1 ? (int)if_nametoindex(argv[1]) : 0};
    if (fd < 0 || !to.sll_ifindex)
        return perror("frame"), 1;
    unsigned char head[2], frame[65535];
    while (fread(head, 1, 2, stdin) == 2) {
        size_t size = head[0] << 8 | head[1];
        if (fread(frame, 1, size, stdin) != size)
            return 2;
        if (sendto(fd, frame, size, 0, (struct sockaddr *)&to, sizeof to) != (ssize_t)size)
            return perror("send"), 1;
    }
    return 0;
}
