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

void splice_begin(struct conn *down, struct conn *up)
{
    struct loop *l = down->loop;
    if (pipe2(down->pipe, O_NONBLOCK | O_CLOEXEC) != 0 || pipe2(up->pipe, O_NONBLOCK | O_CLOEXEC) != 0) {
        conn_kill(down);
        return;
    }
    xchg_begin(&down->x, down, NULL);
    down->x.to = down->to;
    down->x.passed = true;
    l->counters[M_PASSED_THROUGH]++;
    down->phase = up->phase = P_SPLICE;
    down->x.up_bytes += buf_size(&down->in);
    conn_write(up, down->in.p + down->in.off, buf_size(&down->in)); /* the hello that was read to decide */
    buf_free(l, &down->in);
    conn_timer(down, T_STREAM);
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

void splice_run(struct conn *c)
{
    struct conn *down = c->kind == DOWN ? c : c->peer, *up = c->kind == UP ? c : c->peer;
    if (!down || !up) {
        conn_kill(c);
        return;
    }
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
                tls_close_notify(to);
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
