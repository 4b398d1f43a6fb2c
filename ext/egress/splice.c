/* Connections whose bytes are carried without being read.
 *
 * splice: passed through. Bytes move from socket to socket inside the kernel, through a pipe per direction, so pinning,
 * HTTP/2 and client certificates keep working, and a transfer of any size needs no memory of ours.
 * tunnel: after 101 Switching Protocols. Both sides are TLS of their own, so bytes are opened and sealed again.
 * Both carry half-closes: the end of one direction is the end of that direction only.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "loop.h"

enum { PIECE = 64 * 1024 };

static void end_both(struct conn *c, enum reason why)
{
    struct conn *down = c->kind == DOWN ? c : c->peer;
    if (down && down->x.active) {
        down->x.reason = why;
        down->x.active = false;
        audit_record(down->loop, down->tenant, &down->x);
    }
    if (down)
        conn_kill(down);
    conn_kill(c);
}

static bool open_pipe(struct conn *c)
{
    if (!conn_take(c, B_DESCRIPTORS, 2))
        return false;
    if (pipe2(c->pipe, O_NONBLOCK | O_CLOEXEC) == 0)
        return true;
    conn_give(c, B_DESCRIPTORS, 2);
    return false;
}

/* The client has seen nothing of the host: it can still get the reason, inside TLS. */
static void give_up(struct conn *down, enum reason why, const char *detail)
{
    struct conn *up = down->peer;
    down->peer = up->peer = NULL;
    conn_kill(up);
    down->x.active = false;
    down_pass_failed(down, why, detail);
}

void splice_unanswered(struct conn *down)
{
    give_up(down, R_UPSTREAM_TIMEOUT, NULL);
}

void splice_begin(struct conn *down, struct conn *up)
{
    if (!open_pipe(down) || !open_pipe(up)) {
        give_up(down, R_BUSY, NULL);
        return;
    }
    if (!down->front) { /* one of an ingress began with its hello */
        xchg_begin(&down->x, down, NULL);
        down->x.to = down->to;
        down->x.ruled = down->looked;
        down->x.passed = true;
    }
    down->phase = up->phase = P_SPLICE;
    conn_write(up, down->in.p + down->in.off, down->hello_size); /* and no more until the host answers in TLS */
    conn_timer(down, T_HANDSHAKE);
    conn_timer(up, -1);
    conn_again(down);
}

/* Moves what can be moved; false if the connection broke. */
static bool move(struct conn *from, struct conn *to, uint64_t *count)
{
    conn_flush(to);
    if (to->broken)
        return false;
    for (unsigned turns = 0; !buf_size(&to->out); turns++) {
        if (turns == 64) {
            conn_again(from);
            return true;
        }
        if (from->piped) {
            ssize_t n = splice(from->pipe[0], NULL, to->fd, NULL, from->piped, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
            if (n <= 0) {
                to->blocked = errno == EAGAIN;
                return n < 0 && errno == EAGAIN;
            }
            from->piped -= (size_t)n;
            *count += (uint64_t)n;
        } else if (from->sock_eof) {
            if (!to->shut_done) {
                to->shut_done = true;
                (void)shutdown(to->fd, SHUT_WR);
            }
            return true;
        } else {
            ssize_t n = splice(from->fd, NULL, from->pipe[1], NULL, PIECE, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
            if (n < 0)
                return errno == EAGAIN;
            if (n == 0)
                from->sock_eof = true;
            from->piped += (size_t)n;
        }
    }
    return true;
}

/* The host's first bytes: a ServerHello or an alert, else this is not TLS and is not carried. -1: it is not; 0: wait.
 * */
static int check_tls(struct conn *up)
{
    uint8_t p[6];
    conn_flush(up);
    if (up->broken)
        return -1;
    ssize_t n = recv(up->fd, p, sizeof p, MSG_PEEK);
    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -1;
    if (n == 0 || (p[0] != 0x15 && p[0] != 0x16) || (n > 1 && p[1] != 3))
        return -1;
    if (n < (ssize_t)sizeof p)
        return up->readable_end ? -1 : 0;
    return p[0] == 0x15 || p[5] == 2 ? 1 : -1;
}

/* True: the host has answered in TLS, and what the client sent after its hello is on its way. */
static bool open_splice(struct conn *down, struct conn *up)
{
    struct loop *l = down->loop;
    int answered = check_tls(up);
    if (answered < 0)
        give_up(down, R_UPSTREAM_TLS, "it does not answer in TLS");
    if (answered <= 0)
        return false;
    up->spoke_tls = true;
    l->counters[M_PASSED_THROUGH] += !down->front;
    down->x.up_bytes += buf_size(&down->in);
    conn_write(up, down->in.p + down->in.off + down->hello_size, buf_size(&down->in) - down->hello_size);
    buf_free(l, &down->in);
    return true;
}

void splice_run(struct conn *c)
{
    struct conn *down = c->kind == DOWN ? c : c->peer, *up = c->kind == UP ? c : c->peer;
    if (!down || !up) {
        conn_kill(c);
        return;
    }
    if (!up->spoke_tls && down->readable_end) { /* without having seen the answer it cannot have said all */
        conn_lost(down);
        return;
    }
    if (!up->spoke_tls && !open_splice(down, up))
        return;
    bool ok = move(down, up, &down->x.up_bytes) && move(up, down, &down->x.down_bytes);
    if (!ok || (down->shut_done && up->shut_done)) {
        end_both(c, ok ? R_NONE : down->hung_up ? R_CLIENT_CLOSED : R_UPSTREAM_CLOSED);
        return;
    }
    conn_timer(down, down->sock_eof || up->sock_eof ? T_HALF : T_STREAM);
}

void tunnel_begin(struct conn *down, struct conn *up)
{
    down->peer = up;
    up->peer = down;
    down->phase = up->phase = P_TUNNEL;
    down->x.tunnel = true;
    down->x.up = NULL;
    up->one = NULL;
    down->loop->counters[M_TUNNELS]++;
    conn_timer(up, -1);
    conn_again(down);
    conn_again(up);
}

static bool carry(struct conn *from, struct conn *to, uint64_t *count)
{
    for (unsigned turns = 0; turns < 64; turns++) {
        size_t n = buf_size(&from->in);
        if (n) {
            if (conn_wants_room(to))
                return true;
            conn_write(to, from->in.p + from->in.off, n);
            buf_take(from->loop, &from->in, n);
            *count += n;
            continue;
        }
        ssize_t got = to->shut_after ? 0 : conn_read(from);
        if (got == 0)
            return true;
        if (got == -2)
            return false;
        if (got == -1) {
            if (to->ssl)
                conn_close_notify(to);
            to->shut_after = true;
            conn_mark(to);
            return true;
        }
    }
    conn_again(from);
    return true;
}

void tunnel_run(struct conn *c)
{
    struct conn *down = c->kind == DOWN ? c : c->peer, *up = c->kind == UP ? c : c->peer;
    if (!down || !up) {
        conn_kill(c);
        return;
    }
    bool ok = carry(down, up, &down->x.up_bytes) && carry(up, down, &down->x.down_bytes);
    if (!ok || (down->shut_done && up->shut_done)) {
        end_both(c, ok ? R_NONE : R_CLIENT_CLOSED);
        return;
    }
    conn_timer(down, down->shut_after || up->shut_after ? T_HALF : T_STREAM);
}
