/* Connections to hosts: resolve the name, check the addresses, dial the checked address, verify the certificate for the
 * name, keep for reuse.
 *
 * A connection is shared by nobody but requests of one instance, to one host and port, under one generation of its rules:
 * so no tenant can meet another's bytes, and an old credential's connection dies with the rule. One forbidden address
 * among a name's addresses refuses all of them: an attacker's resolver would only have to answer twice.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/x509.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "down.h"
#include "identity.h"
#include "loop.h"

enum { MAX_STREAMS = 100 };

static struct conn **slot_of(struct loop *l, const struct tenant *t, const struct destination *to)
{
    unsigned h = (unsigned)t->id * 31 + to->port;
    for (unsigned i = 0; i < to->host.len; i++)
        h = h * 33 + (unsigned char)to->host.text[i];
    return &l->pool[(h ^ h >> 8) % POOL_SLOTS];
}

static bool same_place(const struct conn *c, const struct tenant *t, uint64_t generation, const struct destination *to)
{
    return c->tenant == t && c->generation == generation && c->to.port == to->port && c->to.tls == to->tls
        && c->to.host.len == to->host.len && memcmp(c->to.host.text, to->host.text, to->host.len) == 0;
}

void pool_remove(struct conn *c)
{
    *(c->pool_prev ? &c->pool_prev->pool_next : slot_of(c->loop, c->tenant, &c->to)) = c->pool_next;
    if (c->pool_next)
        c->pool_next->pool_prev = c->pool_prev;
    c->loop->idle -= c->idle;
    c->pooled = c->idle = false;
    c->pool_prev = c->pool_next = NULL;
}

static void pool_add(struct conn *c)
{
    struct conn **slot = slot_of(c->loop, c->tenant, &c->to);
    c->pooled = true;
    c->pool_prev = NULL;
    c->pool_next = *slot; /* last in, first out: the warmest is used, the others may expire */
    if (*slot)
        (*slot)->pool_prev = c;
    *slot = c;
}

static bool is_stale(const struct conn *c)
{
    if (c->front)
        return front_generation(c->loop, &c->to) != c->generation;
    return atomic_load(&c->tenant->removed) || atomic_load(&c->tenant->generation) != c->generation;
}

/* Closes the connection that has been idle for longest, of one instance or of any. */
static bool drop_idle(struct loop *l, const struct tenant *t)
{
    struct conn *c = l->timers[T_IDLE_UP].first;
    while (c && !(c->idle && (!t || c->tenant == t)))
        c = c->timer.next;
    if (c)
        conn_kill(c);
    return c != NULL;
}

static unsigned count_idle(const struct conn *c)
{
    unsigned n = 0;
    for (const struct conn *other = *slot_of(c->loop, c->tenant, &c->to); other; other = other->pool_next)
        n += other->idle && same_place(other, c->tenant, c->generation, &c->to);
    return n;
}

/* For reuse, unless there are many already. */
static void keep_idle(struct conn *c)
{
    struct loop *l = c->loop;
    const struct conn *top = *slot_of(l, c->tenant, &c->to);
    c->pool_depth = top && top->idle && same_place(top, c->tenant, c->generation, &c->to) ? top->pool_depth + 1 : 0;
    if (c->pool_depth >= POOL_PER_KEY) /* those below may have gone since */
        c->pool_depth = count_idle(c);
    if (c->pool_depth >= POOL_PER_KEY) {
        conn_finish(c, false);
        return;
    }
    pool_add(c);
    c->idle = true;
    conn_timer(c, T_IDLE_UP);
    if (++l->idle > POOL_IDLE)
        drop_idle(l, NULL);
}

void up_release(struct conn *c)
{
    struct loop *l = c->loop;
    if (!c->keep || c->spent || c->dead || c->broken || c->sock_eof || c->readable_end || l->draining
        || buf_size(&c->in) || is_stale(c)) {
        if (c->ssl && !c->dead && !c->broken && !c->sock_eof)
            conn_finish(c, false);
        else
            conn_kill(c);
        return;
    }
    keep_idle(c);
}

static struct conn **asked(struct loop *l, uint64_t token)
{
    return &l->asked[token % ASKED_SLOTS];
}

static void forget_question(struct conn *c)
{
    *(c->ask_prev ? &c->ask_prev->ask_next : asked(c->loop, c->token)) = c->ask_next;
    if (c->ask_next)
        c->ask_next->ask_prev = c->ask_prev;
    c->ask_prev = c->ask_next = NULL;
    c->asking = false;
}

static void up_killed(struct conn *c)
{
    if (c->asking)
        forget_question(c);
    if (c->pooled)
        pool_remove(c);
}

/* NULL: the instance, or all of them, have too many connections to hosts. Idle ones make room. */
static struct conn *dial(struct loop *l, struct tenant *t, const struct destination *to, uint64_t generation)
{
    struct conn *c = conn_new(l, UP, -1);
    c->side = &UP1; /* until TLS says HTTP/2 */
    c->killed = up_killed;
    tenant_hold(t);
    c->tenant = t;
    c->front = t->clients != NULL;
    if (!conn_count(c) && !(drop_idle(l, t) && conn_count(c))) {
        conn_kill(c);
        return NULL;
    }
    c->to = *to;
    c->generation = generation;
    c->phase = P_RESOLVE;
    conn_timer(c, c->front ? T_PLACE : T_RESOLVE);
    l->counters[M_UPSTREAM_OPENED] += !c->front;
    return c;
}

static void find_addresses(struct conn *c)
{
    if (c->front && front_place(c, &c->candidates[0])) {
        c->addresses = 1;
    } else if (c->to.host.kind == HOST_NAME) {
        c->token = c->front ? engine_ask(c->loop->engine, c->loop->index, c->to.host.text, "")
                            : engine_ask(c->loop->engine, c->loop->index, c->tenant->instance, c->to.host.text);
        struct conn **slot = asked(c->loop, c->token);
        c->ask_prev = NULL;
        c->ask_next = *slot;
        if (*slot)
            (*slot)->ask_prev = c;
        *slot = c;
        c->asking = true;
        return; /* token 0, without memory: its time runs out */
    } else {
        c->addresses = addr_parse(c->to.host.text, &c->candidates[0]) ? 1 : 0;
    }
    conn_again(c); /* checked and dialled in the next round: callers hold half-made things */
}

static unsigned max_streams(const struct conn *c)
{
    unsigned host = nghttp2_session_get_remote_settings(c->h2, NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS);
    return host < MAX_STREAMS ? host : MAX_STREAMS;
}

enum take up_take(struct xchg *x, uint64_t generation, bool want_h2, bool fresh)
{
    struct conn *down = x->down;
    struct loop *l = down->loop;
    struct conn *c = *slot_of(l, down->tenant, &x->to);
    for (; c; c = c->pool_next) {
        if (!same_place(c, down->tenant, generation, &x->to) || c->broken || c->readable_end)
            continue;
        /* A connection that was opened for HTTP/1 tells nothing about the host, and gRPC needs HTTP/2 where there is one. */
        if (!fresh && c->phase == P_HTTP1 && (!want_h2 || c->h1_only)) {
            pool_remove(c);
            c->one = x;
            break;
        }
        if (!fresh && c->phase == P_HTTP2 && want_h2 && c->stream_count < max_streams(c))
            break;
        if (c->want_h2 && want_h2 && c->phase < P_HTTP1) { /* on its way: wait with the others */
            x->waiting = true;
            x->awaits = c;
            x->up_next = c->waiting;
            c->waiting = x;
            return TAKE_WAIT;
        }
    }
    if (c) {
        x->up = c;
        x->reused = true;
        x->waiting = false;
        l->counters[M_UPSTREAM_REUSED] += !c->front;
        return TAKE_READY;
    }
    c = dial(l, down->tenant, &x->to, generation);
    if (!c)
        return TAKE_FULL;
    x->waiting = true;
    x->reused = false;
    x->awaits = c;
    c->want_h2 = want_h2;
    if (want_h2) {
        c->waiting = x;
        x->up_next = NULL;
        pool_add(c); /* so that the next streams find it */
    } else {
        c->one = x;
    }
    find_addresses(c);
    return TAKE_WAIT;
}

void up_unwait(struct xchg *x)
{
    struct conn *c = x->awaits;
    x->waiting = false;
    x->awaits = NULL;
    if (!c)
        return;
    if (c->one == x) {
        c->one = NULL;
        conn_kill(c);
        return;
    }
    for (struct xchg **at = &c->waiting; *at; at = &(*at)->up_next)
        if (*at == x) {
            *at = x->up_next;
            break;
        }
    x->up_next = NULL;
}

void up_pass(struct conn *down)
{
    uint64_t generation =
        down->front ? front_generation(down->loop, &down->to) : atomic_load(&down->tenant->generation);
    struct conn *c = dial(down->loop, down->tenant, &down->to, generation);
    if (!c) {
        down->pass_refused = true;
        conn_again(down);
        return;
    }
    c->pass_for = down;
    down->passing = c;
    find_addresses(c);
}

void up_unpass(struct conn *down)
{
    struct conn *c = down->passing;
    down->passing = NULL;
    if (c) {
        c->pass_for = NULL;
        conn_kill(c);
    }
}

/* Whether the address is this host's own: the kernel would then choose it as the source as well. Sends nothing. */
static bool is_own(struct addr a)
{
    struct sockaddr_storage to, from;
    socklen_t n = addr_to_sockaddr(a, 9, &to), m = sizeof from;
    uint16_t port;
    int fd = socket(to.ss_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return false;
    bool own = false;
    if (connect(fd, (struct sockaddr *)&to, n) == 0 && getsockname(fd, (struct sockaddr *)&from, &m) == 0) {
        struct addr b = addr_from_sockaddr(&from, &port);
        own = memcmp(a.b, b.b, sizeof a.b) == 0;
    }
    (void)close(fd);
    return own;
}

static enum reason check_addresses(struct conn *c)
{
    const struct reach *r = &c->loop->engine->reach;
    uint64_t generation;
    if (!c->addresses)
        return R_RESOLVE;
    struct snapshot *s = tenant_borrow(c->tenant, &generation);
    if (!s)
        return R_UNREGISTERED;
    enum private private = s->private;
    snapshot_release(s);
    for (unsigned i = 0; i < c->addresses; i++) {
        if (!addr_reachable(r, c->candidates[i], private))
            return R_ADDRESS_DENIED;
        if (!addr_explicitly_allowed(r, c->candidates[i]) && is_own(c->candidates[i]))
            return R_ADDRESS_DENIED;
    }
    return R_NONE;
}

static void begin_dialling(struct conn *c)
{
    enum reason why = c->front ? R_NONE : check_addresses(c); /* the server knows where guests are */
    if (why != R_NONE) {
        up_failed(c, why, NULL);
        return;
    }
    c->address = 0;
    up_next_address(c);
}

/* NULL: the answer is no longer wanted. */
static struct conn *who_asked(struct loop *l, uint64_t token)
{
    struct conn *c = *asked(l, token);
    while (c && c->token != token)
        c = c->ask_next;
    if (c)
        forget_question(c);
    return c;
}

void up_place(struct loop *l, uint64_t token, unsigned n, struct addr address, bool exists)
{
    struct conn *c = who_asked(l, token);
    if (!c || !c->front)
        return;
    l->payer = c->tenant;
    if (n) {
        c->addresses = 1;
        c->candidates[0] = address;
        front_remember(c, &address);
        begin_dialling(c);
    } else {
        const struct xchg *first = c->pass_for ? &c->pass_for->x : c->one ? c->one : c->waiting;
        const struct visit *v = first ? first->visit : NULL;
        up_failed(c, exists || !v || !v->route->captured ? R_NOT_RUNNING : R_NO_SITE, NULL);
    }
    l->payer = NULL;
}

void up_answer(struct loop *l, uint64_t token, unsigned n, const struct addr *addresses)
{
    struct conn *c = who_asked(l, token);
    if (!c || c->front)
        return;
    l->payer = c->tenant;
    c->addresses = n < MAX_ADDRESSES ? n : MAX_ADDRESSES;
    memcpy(c->candidates, addresses, c->addresses * sizeof *addresses);
    begin_dialling(c);
    l->payer = NULL;
}

void up_next_address(struct conn *c)
{
    c->phase = P_CONNECT;
    while (c->address < c->addresses) {
        struct sockaddr_storage to;
        socklen_t n = addr_to_sockaddr(c->candidates[c->address++], c->to.port, &to);
        if (c->fd >= 0)
            (void)close(c->fd);
        c->fd = socket(to.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (c->fd < 0)
            continue;
        int one = 1;
        (void)setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        c->blocked = c->hung_up = c->readable_end = false;
        if ((connect(c->fd, (struct sockaddr *)&to, n) == 0 || errno == EINPROGRESS) && conn_watch(c)) {
            conn_timer(c, c->front ? T_DIAL : T_CONNECT);
            return;
        }
    }
    if (c->front)
        front_remember(c, NULL);
    up_failed(c, c->timed_out ? R_CONNECT_TIMEOUT : R_CONNECT, c->detail[0] ? c->detail : NULL);
}

/* Prepares the handshake for the certificate of a rule, if there is one for this host. */
static enum reason show_certificate(struct conn *c)
{
    if (c->front)
        return R_NONE;
    struct snapshot *s = tenant_borrow(c->tenant, &c->generation);
    if (!s)
        return R_UNREGISTERED;
    const struct rule *r = identity_for(s, &c->to.host, c->to.port);
    enum reason why = R_NONE;
    c->certified = r != NULL;
    if (r && !(rule_is_ready(r, c->loop->now_s) && identity_use(c->ssl, r)))
        why = R_CREDENTIAL;
    snapshot_release(s);
    return why;
}

static void begin_http2(struct conn *c)
{
    c->phase = P_HTTP2;
    if (!up2_begin(c))
        up_failed(c, R_UPSTREAM_TLS, NULL);
    else
        up_ready(c);
}

void up_connected(struct conn *c)
{
    int error = 0;
    socklen_t n = sizeof error;
    (void)getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &n);
    if (error) {
        c->timed_out |= c->front && (error == ETIMEDOUT || error == EHOSTUNREACH);
        (void)snprintf(c->detail, sizeof c->detail, "%s", strerror(error));
        up_next_address(c);
        return;
    }
    struct sockaddr_storage peer;
    n = sizeof peer;
    if (getpeername(c->fd, (struct sockaddr *)&peer, &n) != 0)
        return; /* an event of the socket before */
    c->hung_up = false;
    if (c->front && c->want_h2) { /* with prior knowledge, RFC 9113 3.3 */
        begin_http2(c);
        return;
    }
    if (c->to.mysql) { /* it speaks first */
        c->phase = P_MYSQL;
        up_ready(c);
        return;
    }
    if (postgres_asks_for_tls(c)) {
        conn_timer(c, T_HANDSHAKE);
        postgres_ask_for_tls(c);
        return;
    }
    if (c->pass_for || !c->to.tls) {
        c->phase = c->to.postgres ? P_POSTGRES : P_HTTP1;
        up_ready(c);
        return;
    }
    conn_timer(c, T_HANDSHAKE);
    up_begin_tls(c);
}

void up_begin_tls(struct conn *c)
{
    if (!tls_begin(c, SSL_new(c->loop->engine->client), false)) {
        up_failed(c, R_UPSTREAM_TLS, NULL);
        return;
    }
    enum reason why = show_certificate(c);
    if (why != R_NONE) {
        up_failed(c, why, NULL);
        return;
    }
    up_run(c);
}

static void shake_hands(struct conn *c)
{
    int r = tls_handshake(c);
    if (r == 0) {
        if (c->sock_eof)
            up_failed(c, R_UPSTREAM_TLS, "closed during the handshake");
        return;
    }
    long verdict = SSL_get_verify_result(c->ssl);
    if (r < 0 && verdict != X509_V_OK) {
        c->loop->counters[M_VERIFY_FAILED]++;
        up_failed(c, R_CERTIFICATE, X509_verify_cert_error_string(verdict));
        return;
    }
    if (r < 0) {
        const char *text = ERR_reason_error_string(ERR_peek_error());
        up_failed(c, R_UPSTREAM_TLS, text);
        return;
    }
    const unsigned char *alpn;
    unsigned n;
    SSL_get0_alpn_selected(c->ssl, &alpn, &n);
    bool h2 = n == 2 && memcmp(alpn, "h2", 2) == 0;
    SSL_certs_clear(c->ssl); /* the key was for this handshake only */
    conn_mark(c);            /* the Finished message */
    if (h2) {
        begin_http2(c);
        return;
    }
    c->phase = c->to.postgres ? P_POSTGRES : c->to.mysql ? P_MYSQL : P_HTTP1;
    up_ready(c);
}

static void hand_over(struct conn *c, struct xchg *x)
{
    x->waiting = false;
    x->awaits = NULL;
    x->up_next = NULL;
    x->up = c;
    x->down->side->resume(x);
}

void up_ready(struct conn *c)
{
    up_timer(c);
    if (c->pass_for) {
        struct conn *down = c->pass_for;
        c->pass_for = NULL;
        down->passing = NULL;
        down_pass_ready(down, c);
        return;
    }
    if (!c->want_h2) {
        hand_over(c, c->one);
        return;
    }
    struct xchg *x = c->waiting;
    c->waiting = NULL;
    if (c->phase == P_HTTP2) {
        if (!x)
            conn_timer(c, T_IDLE_UP);
        while (x) {
            struct xchg *next = x->up_next;
            hand_over(c, x);
            x = next;
        }
        return;
    }
    /* The host speaks HTTP/1 only: one connection for each of those who waited. */
    pool_remove(c);
    c->keep = c->h1_only = true;
    if (!x) {
        up_release(c);
        return;
    }
    struct xchg *rest = x->up_next;
    c->one = x;
    hand_over(c, x);
    while (rest) {
        struct xchg *next = rest->up_next;
        struct conn *more = dial(c->loop, c->tenant, &c->to, c->generation);
        if (!more) {
            up_failed_one(c, rest, R_BUSY, NULL);
            rest = next;
            continue;
        }
        more->one = rest;
        more->h1_only = true;
        rest->awaits = more;
        rest->up_next = NULL;
        find_addresses(more);
        rest = next;
    }
}

/* A kept connection may be closed by the host just as we write: nothing was answered, nothing can have happened twice,
 * so ask again on a new one. A host of HTTP/2 may even say that it has not looked at a stream. */
static bool may_ask_again(const struct xchg *x)
{
    bool refused = x->reset_code == NGHTTP2_REFUSED_STREAM && !x->taken;
    return (x->retriable || refused) && !x->retried && !x->resp_started && x->down;
}

void up_failed_one(struct conn *c, struct xchg *x, enum reason why, const char *detail)
{
    x->up = NULL;
    x->waiting = false;
    x->awaits = NULL;
    x->up_next = NULL;
    if (why == R_UPSTREAM_CLOSED && may_ask_again(x)) {
        x->retried = true;
        x->retriable = false;
        x->req_done = false;
        x->reset_code = 0;
        x->down->side->again(x);
        if (up_take(x, c->generation, c->h2 != NULL, true) != TAKE_FULL)
            return;
        why = R_BUSY;
    }
    down_fail(x, why, detail);
}

void up_failed(struct conn *c, enum reason why, const char *detail)
{
    if (c->dead)
        return;
    struct xchg *one = c->one, *waiting = c->waiting;
    struct conn *down = c->pass_for;
    bool busy = one || waiting || down || c->streams;
    c->loop->counters[M_UPSTREAM_FAILED] += busy && !c->front;
    c->one = NULL;
    c->waiting = NULL;
    c->pass_for = NULL;
    if (c->pooled)
        pool_remove(c);
    if (down) {
        down->passing = NULL;
        down_pass_failed(down, why, detail);
    }
    if (one)
        up_failed_one(c, one, why, detail);
    while (waiting) {
        struct xchg *next = waiting->up_next;
        up_failed_one(c, waiting, why, detail);
        waiting = next;
    }
    while (c->streams) {
        struct xchg *x = c->streams;
        up2_detach(c, x);
        up_failed_one(c, x, why, detail);
    }
    conn_kill(c);
}

void up_ended_early(struct xchg *x)
{
    struct conn *up = x->up;
    x->closing = true;
    x->req_done = true;
    x->up = NULL;
    if (up) {
        up->one = NULL;
        conn_kill(up);
    }
    xchg_try_finish(x);
}

/* Whether a connection whose requests cannot be seen (any more) may go on under its instance's present rules. */
static bool may_go_on(struct conn *down)
{
    uint64_t generation;
    bool unread, good;
    struct conn *up = down->passing ? down->passing : down->peer;
    if (!up || up->generation == atomic_load(&down->tenant->generation))
        return true;
    struct snapshot *s = tenant_borrow(down->tenant, &generation);
    if (!s)
        return false;
    struct ruled now;
    if ((down->pg || down->my) && down->phase == P_TUNNEL) {
        good = down->pg ? postgres_may_go_on(down, s) : mysql_may_go_on(down, s);
        snapshot_release(s);
        up->generation = generation;
        return good;
    }
    look_at_access(s, &up->to, down->loop->now_s, &unread, &now);
    good = down->phase == P_TUNNEL
        ? unread || now.decision == D_ALLOWED
        : unread && !snapshot_covers(s, &up->to.host, up->to.port) && !snapshot_is_login(s, &up->to.host, up->to.port);
    good = good && snapshot_allows_port(s, &up->to.host, up->to.port, up->to.tls, down->loop->now_s)
        && !(s->web_only && up->to.host.kind != HOST_NAME && down->phase != P_TUNNEL);
    snapshot_release(s);
    up->generation = generation;
    return good;
}

void up_sweep(struct loop *l)
{
    struct conn *next;
    for (struct conn *c = l->all; c; c = next) {
        next = c->all_next;
        if (c->dead)
            continue;
        if (c->kind == UP && c->tenant && is_stale(c) && (c->phase == P_HTTP1 ? c->pooled : c->h2 && !c->streams))
            conn_kill(c);
        else if (c->kind == DOWN && c->front) {
            if (front_sweep(c))
                next = l->all; /* it may have taken others with it */
        } else if (c->kind == DOWN && (atomic_load(&c->tenant->removed) || !may_go_on(c))) {
            conn_lost(c);
            next = l->all; /* it may have taken others with it */
        }
    }
}

void up_part(struct loop *l, const char *instance)
{
    struct conn *next;
    for (struct conn *c = l->all; c; c = next) {
        next = c->all_next;
        if (c->kind != UP || !c->front || strcmp(c->to.host.text, instance) != 0)
            continue;
        l->payer = c->tenant;
        if (c->phase == P_TUNNEL || c->phase == P_SPLICE)
            conn_lost(c);
        else
            up_failed(c, R_NOT_RUNNING, NULL);
        l->payer = NULL;
        next = l->all; /* it has taken others with it */
    }
}

void up_run(struct conn *c)
{
    switch (c->phase) {
    case P_RESOLVE:
        if (!c->asking)
            begin_dialling(c);
        break;
    case P_HANDSHAKE:
        shake_hands(c);
        break;
    case P_HTTP1:
        up1_run(c);
        break;
    case P_HTTP2:
        up2_run(c);
        break;
    case P_WAIT_PASS:
        if (c->hung_up)
            conn_lost(c);
        break;
    case P_POSTGRES_TLS:
        postgres_tls_answer(c);
        break;
    case P_POSTGRES:
        postgres_host_run(c);
        break;
    case P_MYSQL:
        mysql_host_run(c);
        break;
    case P_TUNNEL:
        tunnel_run(c);
        break;
    case P_SPLICE:
        splice_run(c);
        break;
    default:
        break;
    }
}
