/*
 * Echoes TCP on ports 7 and 9 and UDP on port 7, for tests of packets that wake a guest. One process, select.
 * With an address and a port it sends its input there over UDP instead, and prints the answer.
 */

#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <unistd.h>

static int listening(int type, int port)
{
    int fd = socket(AF_INET, type, 0), one = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || (type == SOCK_STREAM && listen(fd, 512)))
        _exit(1);
    return fd;
}

static int ask(const char *address, const char *port)
{
    struct sockaddr_in peer = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
    char data[2048];
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    ssize_t got = read(0, data, sizeof data);

    alarm(60);
    inet_pton(AF_INET, address, &peer.sin_addr);
    if (got < 0 || connect(fd, (struct sockaddr *)&peer, sizeof peer) || write(fd, data, got) != got)
        return 1;
    got = read(fd, data, sizeof data);
    return got < 0 || write(1, data, got) != got;
}

int main(int count, char **arguments)
{
    if (count == 3)
        return ask(arguments[1], arguments[2]);

    int tcp = listening(SOCK_STREAM, 7), other = listening(SOCK_STREAM, 9), udp = listening(SOCK_DGRAM, 7);
    int top = udp;
    char data[2048];
    fd_set all, ready;

    signal(SIGPIPE, SIG_IGN);
    FD_ZERO(&all);
    FD_SET(tcp, &all);
    FD_SET(other, &all);
    FD_SET(udp, &all);
    for (;;) {
        ready = all;
        if (select(top + 1, &ready, NULL, NULL, NULL) < 0)
            continue;
        for (int fd = 0; fd <= top; fd++) {
            if (!FD_ISSET(fd, &ready))
                continue;
            if (fd == tcp || fd == other) {
                int made = accept(fd, NULL, NULL);
                if (made >= FD_SETSIZE)
                    close(made);
                else if (made >= 0) {
                    FD_SET(made, &all);
                    top = made > top ? made : top;
                }
            } else if (fd == udp) {
                struct sockaddr_in peer;
                socklen_t size = sizeof peer;
                ssize_t got = recvfrom(udp, data, sizeof data, 0, (struct sockaddr *)&peer, &size);
                if (got >= 0)
                    sendto(udp, data, got, 0, (struct sockaddr *)&peer, size);
            } else {
                ssize_t got = read(fd, data, sizeof data);
                if (got <= 0 || write(fd, data, got) != got) {
                    FD_CLR(fd, &all);
                    close(fd);
                }
            }
        }
    }
}
