/* Load for the egress benchmark: many HTTPS connections in one thread, one request after the other on each.
 *
 *   egress_load PORT SERVER_NAME PATH CONNECTIONS MILLISECONDS [new] [BODY_BYTES]
 *
 * "new": a TLS connection per request. BODY_BYTES: POST of so many bytes. Prints requests and errors.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <openssl/ssl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

struct client {
    SSL *ssl;
    int fd;
    size_t sent;     /* of head and body */
    char head[4096]; /* of the response */
    size_t head_n;
    long long left; /* of its body; -1: head not complete */
};

static SSL_CTX *ctx;
static struct sockaddr_in to;
static char request[1024];
static size_t request_n, body_n;
static char *name, zeros[65536];
static int every_time, epoll;
static unsigned long long done, errors;

static void open_client(struct client *c)
{
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(c->fd, (struct sockaddr *)&to, sizeof to) != 0) {
        perror("connect");
        exit(1);
    }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    c->ssl = SSL_new(ctx);
    SSL_set_fd(c->ssl, c->fd);
    SSL_set_tlsext_host_name(c->ssl, name);
    SSL_set1_host(c->ssl, name);
    SSL_set_connect_state(c->ssl);
    c->sent = c->head_n = 0;
    c->left = -1;
    struct epoll_event e = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = c};
    epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &e);
}

static void close_client(struct client *c)
{
    SSL_free(c->ssl);
    close(c->fd);
}

static int again(struct client *c, int r)
{
    int e = SSL_get_error(c->ssl, r);
    if (e == SSL_ERROR_WANT_READ || e == SSL_ERROR_WANT_WRITE)
        return 1;
    errors++;
    close_client(c);
    open_client(c);
    return 0;
}

static void finished(struct client *c)
{
    done++;
    c->sent = c->head_n = 0;
    c->left = -1;
    if (every_time) {
        SSL_shutdown(c->ssl);
        close_client(c);
        open_client(c);
    }
}

static void drive(struct client *c)
{
    static char in[65536];
    for (;;) {
        while (c->sent < request_n + body_n) {
            int r;
            if (c->sent < request_n) {
                r = SSL_write(c->ssl, request + c->sent, (int)(request_n - c->sent));
            } else {
                size_t n = request_n + body_n - c->sent;
                r = SSL_write(c->ssl, zeros, (int)(n < 16384 ? n : 16384));
            }
            if (r <= 0) {
                if (again(c, r))
                    return;
                continue;
            }
            c->sent += (size_t)r;
        }
        int r = SSL_read(c->ssl, in, sizeof in);
        if (r <= 0) {
            if (again(c, r))
                return;
            continue;
        }
        char *p = in;
        size_t n = (size_t)r;
        if (c->left < 0) {
            size_t k = n < sizeof c->head - 1 - c->head_n ? n : sizeof c->head - 1 - c->head_n;
            memcpy(c->head + c->head_n, in, k);
            c->head_n += k;
            c->head[c->head_n] = 0;
            char *end = strstr(c->head, "\r\n\r\n");
            if (!end)
                continue;
            char *length = strcasestr(c->head, "content-length:");
            if (memcmp(c->head, "HTTP/1.1 200", 12) != 0 || !length)
                errors++;
            c->left = length ? atoll(length + 15) : 0;
            n = c->head_n - (size_t)(end + 4 - c->head) + (n - k);
        }
        (void)p;
        c->left -= (long long)n;
        if (c->left <= 0)
            finished(c);
    }
}

int main(int argc, char **argv)
{
    if (argc < 6)
        return 2;
    unsigned n = (unsigned)atoi(argv[4]);
    long ms = atol(argv[5]);
    to.sin_family = AF_INET;
    to.sin_port = htons((unsigned short)atoi(argv[1]));
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    name = argv[2];
    for (int i = 6; i < argc; i++)
        if (!strcmp(argv[i], "new"))
            every_time = 1;
        else
            body_n = (size_t)atol(argv[i]);
    request_n = (size_t)snprintf(
        request, sizeof request,
        "%s %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: load/1\r\nAccept: */*\r\nAuthorization: Bearer mock-API_KEY\r\n",
        body_n ? "POST" : "GET", argv[3], name);
    if (body_n)
        request_n += (size_t)snprintf(request + request_n, 64, "Content-Length: %zu\r\n", body_n);
    request_n += (size_t)snprintf(request + request_n, 8, "\r\n");
    ctx = SSL_CTX_new(TLS_client_method());
    SSL_CTX_load_verify_file(ctx, getenv("CA"));
    SSL_CTX_set_verify(ctx, SSL_VERIFY_PEER, NULL);
    SSL_CTX_set_mode(ctx, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_CTX_set_session_cache_mode(ctx, SSL_SESS_CACHE_OFF);
    epoll = epoll_create1(0);
    struct client *clients = calloc(n, sizeof *clients);
    for (unsigned i = 0; i < n; i++)
        open_client(&clients[i]);
    struct timespec begin, started, now;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    started = begin;
    for (;;) {
        struct epoll_event events[128];
        int k = epoll_wait(epoll, events, 128, 100);
        for (int i = 0; i < k; i++)
            drive(events[i].data.ptr);
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (!done && now.tv_sec - begin.tv_sec < 60) { /* the time counts from the first response on */
            started = now;
            continue;
        }
        long passed = (now.tv_sec - started.tv_sec) * 1000 + (now.tv_nsec - started.tv_nsec) / 1000000;
        if (passed >= ms)
            break;
    }
    printf("%llu %llu\n", done, errors);
    return 0;
}
