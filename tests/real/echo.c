/*
 * The guest's side of tests of packets that wake it: echoes TCP on ports 7 and 9 and UDP on port 7, and answers HTTP on
 * port 80 with the path of the request, or as a WebSocket that echoes short messages. One process, select. With an
 * address and a port it sends its input there over UDP instead, and prints the answer.
 */

#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <unistd.h>

enum { ECHO, HTTP, ANSWERED, WEBSOCKET };
static char kinds[FD_SETSIZE];

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

/* The answer to a head that arrived in one piece. The key of a WebSocket must be the one in the example of RFC 6455. */
static ssize_t http(int fd, char *data)
{
    char path[256] = "";

    if (strstr(data, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")) {
        kinds[fd] = WEBSOCKET;
        return sprintf(data,
                       "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                       "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n");
    }
    kinds[fd] = ANSWERED;
    sscanf(data, "GET /%255[^ ]", path);
    return sprintf(data, "HTTP/1.1 200 OK\r\nContent-Length: %zu\r\nConnection: close\r\n\r\n%s", strlen(path), path);
}

/* One short frame, which a client masks and a server does not. */
static ssize_t websocket(char *data, ssize_t got)
{
    ssize_t size = got - 6;
    char mask[4];

    if (size < 0)
        return 0;
    memcpy(mask, data + 2, sizeof mask);
    data[1] &= 0x7f;
    for (ssize_t at = 0; at < size; at++)
        data[2 + at] = data[6 + at] ^ mask[at % 4];
    return size + 2;
}

static ssize_t answer(int fd, char *data, ssize_t got)
{
    return kinds[fd] == HTTP ? http(fd, data) : kinds[fd] == WEBSOCKET ? websocket(data, got) : got;
}

int main(int count, char **arguments)
{
    if (count == 3)
        return ask(arguments[1], arguments[2]);

    int tcp = listening(SOCK_STREAM, 7), other = listening(SOCK_STREAM, 9), web = listening(SOCK_STREAM, 80);
    int udp = listening(SOCK_DGRAM, 7);
    int top = udp;
    char data[2048];
    fd_set all, ready;

    signal(SIGPIPE, SIG_IGN);
    FD_ZERO(&all);
    FD_SET(tcp, &all);
    FD_SET(other, &all);
    FD_SET(web, &all);
    FD_SET(udp, &all);
    for (;;) {
        ready = all;
        if (select(top + 1, &ready, NULL, NULL, NULL) < 0)
            continue;
        for (int fd = 0; fd <= top; fd++) {
            if (!FD_ISSET(fd, &ready))
                continue;
            if (fd == tcp || fd == other || fd == web) {
                int made = accept(fd, NULL, NULL);
                if (made >= FD_SETSIZE)
                    close(made);
                else if (made >= 0) {
                    FD_SET(made, &all);
                    kinds[made] = fd == web ? HTTP : ECHO;
                    top = made > top ? made : top;
                }
            } else if (fd == udp) {
                struct sockaddr_in peer;
                socklen_t size = sizeof peer;
                ssize_t got = recvfrom(udp, data, sizeof data, 0, (struct sockaddr *)&peer, &size);
                if (got >= 0)
                    sendto(udp, data, got, 0, (struct sockaddr *)&peer, size);
            } else {
                ssize_t got = read(fd, data, sizeof data - 1);
                if (got > 0) {
                    data[got] = 0;
                    got = answer(fd, data, got);
                }
                if (got <= 0 || write(fd, data, got) != got || kinds[fd] == ANSWERED) {
                    FD_CLR(fd, &all);
                    close(fd);
                }
            }
        }
    }
}
