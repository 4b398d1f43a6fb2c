/* Buffers, sockets and timers of connections.
 *
 * Four system calls per proxied request is the minimum (two recv, two send), and it is reached: a socket is added to
 * epoll once (edge-triggered, both directions), a short recv or send is remembered so that no call is made only to get
 * EAGAIN, and all that one round produces for a socket leaves in one send.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "io.h"

/* Buffers come in four sizes and go back to short free lists; idle connections hold none.
 *
 * Each is charged to the instance whose connection is being handled (loop->payer), which is noted in front of it. All
 * connections that exchange bytes belong to one instance and hold a reference, so it exists until the last buffer is
 * freed. */
struct label {
    _Alignas(16) struct tenant *payer;
    int64_t size;
};

static const size_t SIZES[4] = {4096, RECORD + 1024, 2 * RECORD + 4096, 6 * RECORD};
enum { SPARE_EACH = 64 };

static void *charge(struct loop *l, struct label *at, size_t size)
{
    if (!at)
        abort(); /* nothing sensible is left to do without memory */
    *at = (struct label){l->payer, (int64_t)size};
    l->bytes += at->size;
    if (at->payer)
        atomic_fetch_add_explicit(&at->payer->usage.used[B_BYTES], at->size, memory_order_relaxed);
    return at + 1;
}

static void discharge(struct loop *l, struct label *at)
{
    l->bytes -= at->size;
    if (at->payer)
        atomic_fetch_sub_explicit(&at->payer->usage.used[B_BYTES], at->size, memory_order_relaxed);
}

static void *take_block(struct loop *l, size_t n, size_t *cap)
{
    for (unsigned i = 0; i < 4; i++) {
        if (SIZES[i] < n)
            continue;
        *cap = SIZES[i];
        void *p = l->spares[i];
        if (p) {
            memcpy(&l->spares[i], p, sizeof p);
            l->spare_n[i]--;
            return charge(l, (struct label *)p - 1, *cap);
        }
        return charge(l, malloc(sizeof(struct label) + *cap), *cap);
    }
    *cap = n + n / 2;
    return charge(l, malloc(sizeof(struct label) + *cap), *cap);
}

static void give_block(struct loop *l, void *p, size_t cap)
{
    if (!p)
        return;
    struct label *at = (struct label *)p - 1;
    discharge(l, at);
    for (unsigned i = 0; i < 4; i++)
        if (SIZES[i] == cap && l->spare_n[i] < SPARE_EACH) {
            memcpy(p, &l->spares[i], sizeof p);
            l->spares[i] = p;
            l->spare_n[i]++;
            return;
        }
    free(at);
}

void buf_free_spares(struct loop *l)
{
    for (unsigned i = 0; i < 4; i++)
        while (l->spares[i]) {
            void *p = l->spares[i];
            memcpy(&l->spares[i], p, sizeof p);
            free((struct label *)p - 1);
        }
}

void buf_need(struct loop *l, struct buf *b, size_t room)
{
    if (b->cap - b->len >= room)
        return;
    size_t live = buf_size(b);
    if (b->cap >= live + room) {
        memmove(b->p, b->p + b->off, live);
    } else {
        /* One that fills up gets all that it may hold at once, instead of being copied at each size. */
        size_t cap, want = live > RECORD / 2 && live + room < SIZES[3] ? SIZES[3] : live + room;
        char *p = take_block(l, want, &cap);
        if (live)
            memcpy(p, b->p + b->off, live);
        give_block(l, b->p, b->cap);
        b->p = p;
        b->cap = cap;
    }
    b->off = 0;
    b->len = live;
}

void buf_add(struct loop *l, struct buf *b, const char *p, size_t n)
{
    if (!n)
        return; /* memcpy requires valid pointers, even for no bytes */
    buf_need(l, b, n);
    memcpy(b->p + b->len, p, n);
    b->len += n;
}

void buf_free(struct loop *l, struct buf *b)
{
    give_block(l, b->p, b->cap);
    *b = (struct buf){0};
}

void buf_take(struct loop *l, struct buf *b, size_t n)
{
    b->off += n;
    if (b->off == b->len)
        buf_free(l, b);
}

struct conn *conn_new(struct loop *l, enum kind kind, int fd)
{
    struct conn *c = calloc(1, sizeof *c);
    if (!c)
        abort();
    c->loop = l;
    c->kind = kind;
    c->fd = fd;
    c->pipe[0] = c->pipe[1] = -1;
    c->timer.class = -1;
    c->all_next = l->all;
    if (l->all)
        l->all->all_prev = c;
    l->all = c;
    l->connections++;
    l->counters[M_CONNECTIONS]++;
    return c;
}

bool conn_watch(struct conn *c)
{
    struct epoll_event e = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = c};
    return epoll_ctl(c->loop->epoll, EPOLL_CTL_ADD, c->fd, &e) == 0;
}

bool conn_take(struct conn *c, enum bound what, int64_t n)
{
    bool ok = bound_take(c->tenant->bounds, &c->tenant->usage, what, n);
    c->loop->limited[what] += !ok && !c->front; /* those of clients are counted as refused connections */
    return ok;
}

void conn_give(struct conn *c, enum bound what, int64_t n)
{
    bound_give(c->tenant->bounds, &c->tenant->usage, what, n);
}

static enum bound kind_of(const struct conn *c)
{
    return c->kind == DOWN ? B_CONNECTIONS : B_UPSTREAMS;
}

bool conn_count(struct conn *c)
{
    if (!conn_take(c, kind_of(c), 1))
        return false;
    if (!conn_take(c, B_DESCRIPTORS, 1)) {
        conn_give(c, kind_of(c), 1);
        return false;
    }
    c->counted = true;
    return true;
}

static void uncount(struct conn *c)
{
    if (c->counted) {
        conn_give(c, kind_of(c), 1);
        conn_give(c, B_DESCRIPTORS, 1);
    }
    if (c->shaking)
        conn_give(c, B_HANDSHAKES, 1);
    if (c->windowed)
        conn_give(c, B_WINDOWS, WINDOW_BEYOND);
    c->counted = c->shaking = c->windowed = false;
}

/* An instance that holds too much is still served: each of its connections continues when its bytes have been sent. */
size_t conn_watermark(const struct conn *c)
{
    const struct loop *l = c->loop;
    bool over = l->bytes > l->bytes_share
        || atomic_load_explicit(&c->tenant->usage.used[B_BYTES], memory_order_relaxed)
            > c->tenant->bounds->each[B_BYTES];
    return over ? 1 : WATERMARK;
}

void conn_kill(struct conn *c)
{
    struct loop *l = c->loop;
    if (c->dead)
        return;
    c->dead = true;
    conn_timer(c, -1);
    uncount(c);
    if (c->killed)
        c->killed(c);
    if (c->fd >= 0)
        (void)close(c->fd); /* leaves epoll by itself */
    c->fd = -1;
    if (c->pipe[0] >= 0) {
        (void)close(c->pipe[0]);
        (void)close(c->pipe[1]);
        conn_give(c, B_DESCRIPTORS, 2);
    }
    if (c->peer) {
        struct conn *peer = c->peer;
        c->peer = peer->peer = NULL;
        conn_kill(peer);
    }
    *(c->all_prev ? &c->all_prev->all_next : &l->all) = c->all_next;
    if (c->all_next)
        c->all_next->all_prev = c->all_prev;
    l->connections--;
    l->counters[M_CONNECTIONS]--;
    c->next_dead = l->graveyard;
    l->graveyard = c;
}

bool conn_wants_room(struct conn *c)
{
    if (conn_room(c))
        return false;
    conn_flush(c);
    if (conn_room(c))
        return false;
    c->waited = true;
    return true;
}

size_t conn_room(const struct conn *c)
{
    size_t held = buf_size(&c->out) + buf_size(&c->stage), watermark = conn_watermark(c);
    return held >= watermark ? 0 : WATERMARK - held;
}

void conn_mark(struct conn *c)
{
    if (!c->dirty && !c->dead) {
        c->dirty = true;
        c->next_dirty = c->loop->dirty;
        c->loop->dirty = c;
    }
}

void conn_again(struct conn *c)
{
    if (!c->again && !c->dead) {
        c->again = true;
        c->next_again = c->loop->again;
        c->loop->again = c;
    }
}

static void broken(struct conn *c)
{
    c->broken = true;
    conn_again(c); /* its owner learns of it later, not in the present call */
}

static void seal(struct conn *c, const char *p, size_t n)
{
    if (c->broken || !n)
        return;
    ERR_clear_error();
    if (SSL_write(c->ssl, p, (int)n) != (int)n)
        broken(c);
}

static void seal_stage(struct conn *c)
{
    size_t n = buf_size(&c->stage);
    if (n) {
        seal(c, c->stage.p + c->stage.off, n);
        buf_take(c->loop, &c->stage, n);
    }
}

void conn_write(struct conn *c, const char *p, size_t n)
{
    if (c->dead || c->broken || !n)
        return;
    conn_mark(c);
    if (!c->ssl) {
        buf_add(c->loop, &c->out, p, n);
        return;
    }
    if (buf_size(&c->stage) && (n >= 4096 || buf_size(&c->stage) + n > RECORD))
        seal_stage(c);
    if (n >= 4096) {
        seal(c, p, n);
        return;
    }
    buf_add(c->loop, &c->stage, p, n);
}

void conn_write_chunks(struct conn *c, const char *p, size_t n)
{
    char *s = c->loop->scratch;
    while (n) {
        size_t part = n < RECORD - 16 ? n : RECORD - 16; /* one record a chunk */
        int head = snprintf(s, 16, "%zx\r\n", part);
        memcpy(s + head, p, part);
        memcpy(s + head + part, "\r\n", 2);
        conn_write(c, s, (size_t)head + part + 2);
        p += part;
        n -= part;
    }
}

bool conn_secret(struct conn *c, const char *p, size_t n)
{
    if (c->dead || c->broken)
        return false;
    if (c->ssl) { /* straight into the record: the sealed copy is the only one */
        seal_stage(c);
        seal(c, p, n);
        conn_mark(c);
    } else {
        conn_write(c, p, n);
    }
    return !c->broken;
}

static void send_out(struct conn *c)
{
    while (buf_size(&c->out) && !c->broken && !c->blocked) {
        size_t n = buf_size(&c->out);
        ssize_t sent = send(c->fd, c->out.p + c->out.off, n, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR)
                continue;
            if (errno == EAGAIN)
                c->blocked = true;
            else
                broken(c);
            break;
        }
        c->blocked = (size_t)sent < n;
        buf_take(c->loop, &c->out, (size_t)sent);
    }
}

void conn_alert(struct conn *c)
{
    if (!c->dead && c->fd >= 0)
        send_out(c);
}

static void flush(struct conn *c)
{
    if (c->dead || c->fd < 0 || c->phase == P_CONNECT || c->phase == P_RESOLVE)
        return;
    if (c->ssl && c->phase != P_HANDSHAKE)
        seal_stage(c);
    send_out(c);
    if (c->broken) {
        buf_free(c->loop, &c->out);
        return;
    }
    if (c->waited && conn_room(c)) {
        c->waited = false;
        c->roomy = true;
        conn_again(c);
    }
    if (!buf_size(&c->out)) {
        if (c->close_after && c->phase != P_LINGER) {
            conn_kill(c);
        } else if (c->shut_after && !c->shut_done) {
            c->shut_done = true;
            (void)shutdown(c->fd, SHUT_WR);
        }
    }
}

void conn_flush(struct conn *c)
{
    struct tenant *before = c->loop->payer;
    c->loop->payer = c->tenant;
    flush(c);
    c->loop->payer = before;
}

void conn_close_notify(struct conn *c)
{
    if (!c->broken) {
        ERR_clear_error();
        (void)SSL_shutdown(c->ssl);
        ERR_clear_error();
    }
}

void conn_finish(struct conn *c, bool linger)
{
    if (c->dead)
        return;
    if (c->ssl && c->phase != P_HANDSHAKE) {
        seal_stage(c);
        conn_close_notify(c);
    }
    conn_mark(c);
    if (linger && !c->sock_eof && !c->broken) {
        c->phase = P_LINGER;
        c->shut_after = true;
        conn_timer(c, T_LINGER);
        conn_again(c);
    } else {
        c->close_after = true;
        conn_timer(c, T_LINGER);
    }
}

ssize_t conn_read(struct conn *c)
{
    if (c->broken)
        return -2;
    if (!c->ssl) {
        if (c->sock_eof)
            return -1;
        if (c->drained && !c->readable_end)
            return 0;
        buf_need(c->loop, &c->in, RECORD);
        size_t room = c->in.cap - c->in.len;
        ssize_t n;
        do
            n = recv(c->fd, c->in.p + c->in.len, room, 0);
        while (n < 0 && errno == EINTR);
        if (n > 0) {
            c->drained = (size_t)n < room;
            c->in.len += (size_t)n;
            return n;
        }
        if (!buf_size(&c->in))
            buf_free(c->loop, &c->in);
        if (n == 0) {
            c->sock_eof = c->clean_eof = true;
            return -1;
        }
        c->drained = true;
        return errno == EAGAIN ? 0 : -2;
    }
    if (c->drained && !c->readable_end && !SSL_has_pending(c->ssl))
        return 0;
    buf_need(c->loop, &c->in, RECORD);
    ERR_clear_error();
    int n = SSL_read(c->ssl, c->in.p + c->in.len, (int)(c->in.cap - c->in.len));
    if (n > 0) {
        c->in.len += (size_t)n;
        return n;
    }
    if (!buf_size(&c->in))
        buf_free(c->loop, &c->in);
    switch (SSL_get_error(c->ssl, n)) {
    case SSL_ERROR_WANT_READ:
    case SSL_ERROR_WANT_WRITE:
        return 0;
    case SSL_ERROR_ZERO_RETURN:
        c->clean_eof = true;
        return -1;
    default:
        conn_alert(c);
        return c->sock_eof ? -1 : -2;
    }
}

static void timer_unlink(struct conn *c)
{
    struct loop *l = c->loop;
    struct timer *t = &c->timer;
    *(t->prev ? &t->prev->timer.next : &l->timers[t->class].first) = t->next;
    *(t->next ? &t->next->timer.prev : &l->timers[t->class].last) = t->prev;
}

/* All timers of a class have the same duration, so each class is a queue in the order of expiry: O(1) both ways. */
void conn_timer(struct conn *c, int class)
{
    struct loop *l = c->loop;
    struct timer *t = &c->timer;
    if (t->class >= 0)
        timer_unlink(c);
    t->class = (int8_t)class;
    if (class < 0)
        return;
    t->due_ms = l->now_ms + (class == T_TURN ? 1 : l->timers_ms[class]);
    t->prev = l->timers[class].last;
    t->next = NULL;
    *(t->prev ? &t->prev->timer.next : &l->timers[class].first) = c;
    l->timers[class].last = c;
}
