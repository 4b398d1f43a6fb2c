/* A guest's new connection: who is it, what does it speak, where does it want to go, and is that terminated, passed
 * through or refused?
 *
 * Nothing that the guest said about addresses is trusted. A redirected connection tells its port; the host comes from
 * the TLS server name or Host and is resolved by us. Only without a server name is the dialled address used, and then
 * nothing is ever decrypted or injected.
 * A refusal of TLS is reported inside TLS: a leaf is minted and every request answered with the reason, since a program in
 * the guest can read that, and cannot read a reset.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "hello.h"
#include "login.h"
#include "loop.h"

enum { ORIGINAL_DST = 80 }; /* SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST */

/* Closing it sends RST: the guest sees at once that nobody serves it. */
void socket_reset(int fd)
{
    struct linger now = {1, 0};
    (void)setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
}

void socket_refuse(int fd)
{
    socket_reset(fd);
    (void)close(fd);
}

static void note_original_destination(struct conn *c, int family)
{
    struct sockaddr_storage to;
    socklen_t n = sizeof to;
    int level = family == AF_INET ? SOL_IP : SOL_IPV6;
    c->explicit_proxy = true;
    if (getsockopt(c->fd, level, ORIGINAL_DST, &to, &n) != 0)
        return;
    uint16_t port;
    struct addr a = addr_from_sockaddr(&to, &port);
    if (port == c->loop->engine->listen_port)
        return;
    c->explicit_proxy = false;
    c->dialled = a;
    c->dialled_port = port;
}

/* Out of descriptors: take one connection off the queue with the one kept for this, and close it. Otherwise the listener
 * would stay readable and the loop would spin. */
bool socket_shed(struct loop *l, int listener)
{
    if (l->reserve < 0)
        return false;
    (void)close(l->reserve);
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (fd >= 0)
        socket_refuse(fd);
    l->reserve = eventfd(0, EFD_CLOEXEC);
    return fd >= 0;
}

static void down_killed(struct conn *c)
{
    if (c->x.down)
        xchg_unask(&c->x);
    echo_end(&c->x);
    xchg_uncount(&c->x);
    postgres_end(c);
    mysql_end(c);
}

void accept_all(struct loop *l)
{
    for (;;) {
        struct sockaddr_storage from;
        socklen_t n = sizeof from;
        int fd = accept4(l->listener, (struct sockaddr *)&from, &n, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) {
            if (errno == EINTR || errno == ECONNABORTED)
                continue;
            if ((errno == EMFILE || errno == ENFILE) && socket_shed(l, l->listener)) {
                l->counters[M_TOO_MANY]++;
                continue;
            }
            return;
        }
        uint16_t port;
        struct addr source = addr_from_sockaddr(&from, &port);
        struct tenant *t = table_enter(&l->engine->table, source);
        if (!t) {
            l->counters[M_UNREGISTERED]++;
            socket_refuse(fd);
            continue;
        }
        struct conn *c = conn_new(l, DOWN, fd);
        c->killed = down_killed;
        c->side = &DOWN1; /* until TLS says HTTP/2 */
        c->tenant = t;
        if (!conn_count(c)) {
            l->counters[M_TOO_MANY]++;
            socket_reset(fd);
            conn_kill(c);
            continue;
        }
        c->source = source;
        c->phase = P_DETECT;
        l->counters[M_ACCEPTED]++;
        note_original_destination(c, from.ss_family);
        if (!conn_watch(c)) {
            conn_kill(c);
            continue;
        }
        conn_timer(c, T_HEAD);
        if (mysql_waits(c))
            mysql_begin(c);
        conn_run(c); /* its first bytes are there, unless hear_at_once in engine.c was called */
    }
}

static void terminate(struct conn *c)
{
    struct loop *l = c->loop;
    int64_t now_s = time(NULL);
    if (!mint_has(l->mint, &c->to.host, now_s) && !tenant_may_mint(c->tenant, &l->engine->table.limits, l->now_us)) {
        audit_refusal(c, R_RATE);
        conn_kill(c);
        return;
    }
    c->shaking = conn_take(c, B_HANDSHAKES, 1);
    if (!c->shaking) {
        audit_refusal(c, R_BUSY);
        conn_kill(c);
        return;
    }
    uint64_t before = mint_count(l->mint);
    if (!tls_begin(c, mint_session(l->mint, &c->to.host, now_s), true)) {
        audit_refusal(c, R_CLIENT_TLS);
        conn_kill(c);
        return;
    }
    l->counters[M_MINTED] += mint_count(l->mint) - before;
    c->prefix = c->in;
    c->in = (struct buf){0};
    conn_timer(c, T_HANDSHAKE);
    conn_again(c);
}

void down_pass(struct conn *c)
{
    c->phase = P_WAIT_PASS;
    conn_timer(c, -1);
    up_pass(c);
}

/* What to do with TLS to c->to, with a server name unless `named` is false: R_NONE and *pass, or the reason to answer with. */
static enum reason judge(struct conn *c, bool named, bool *pass)
{
    uint64_t generation;
    struct snapshot *s = tenant_borrow(c->tenant, &generation);
    if (!s)
        return R_UNREGISTERED;
    bool name = c->to.host.kind == HOST_NAME, unread;
    enum reason why = R_NONE;
    *pass = false;
    look_at_access(s, &c->to, c->loop->now_s, &unread, &c->looked);
    c->names_only = s->web_only;
    if (s->web_only && !name) {
        why = named ? R_ADDRESS_LITERAL : R_NO_NAME;
    } else if (!snapshot_allows_port(s, &c->to.host, c->to.port, true, c->loop->now_s)) {
        why = R_PORT;
    } else if (!snapshot_covers(s, &c->to.host, c->to.port)) {
        if (s->unmatched == UNMATCHED_PASS) /* what is refused is refused by request, inside TLS */
            *pass = unread && !snapshot_is_login(s, &c->to.host, c->to.port);
        else if (!name)
            why = R_ADDRESS_LITERAL;
        else if (s->unmatched == UNMATCHED_DENY)
            why = R_HOST_DENIED;
    }
    snapshot_release(s);
    return why;
}

static void on_hello(struct conn *c, const struct hello *h)
{
    struct host name;
    bool pass = false;
    c->prefers_h1 = h->gnutls;
    c->hello_size = h->size;
    if (h->name_len && host_canonical(h->name, h->name_len, false, &name) != HOST_NAME) {
        audit_refusal(c, R_BAD_HOST);
        conn_kill(c);
        return;
    }
    if (c->connected) {
        bool differs = h->name_len && (name.len != c->to.host.len || memcmp(name.text, c->to.host.text, name.len) != 0);
        bool nameless = !h->name_len && c->names_only;
        if (c->peer && (differs || nameless)) { /* connected to one host, asking for another, or for none */
            audit_refusal(c, differs ? R_HOST_MISMATCH : R_NO_NAME);
            conn_kill(c);
            return;
        }
        if (differs) {
            c->to.host = name;
            c->refused = R_HOST_MISMATCH;
        } else if (c->peer) {
            splice_begin(c, c->peer);
            return;
        }
        terminate(c);
        return;
    }
    c->to.tls = true;
    c->to.port = c->explicit_proxy ? c->loop->engine->assumed_tls_port : c->dialled_port;
    if (c->my) {
        mysql_hello(c, &name, h->name_len > 0);
        terminate(c);
        return;
    }
    if (c->pg || h->postgres) {
        if (!postgres_hello(c, &name, h->name_len > 0))
            c->refused = judge(c, true, &pass);
        if (pass)
            down_pass(c);
        else
            terminate(c);
        return;
    }
    if (h->name_len) {
        c->to.host = name;
    } else if (!c->explicit_proxy) {
        addr_text(c->dialled, c->to.host.text);
        c->to.host.len = (uint8_t)strlen(c->to.host.text);
        c->to.host.kind = HOST_IP;
    } else {
        audit_refusal(c, R_BAD_HOST);
        conn_kill(c);
        return;
    }
    c->refused = judge(c, h->name_len > 0, &pass);
    if (pass)
        down_pass(c);
    else
        terminate(c);
}

static enum step read_hello(struct conn *c)
{
    struct hello h;
    size_t n = buf_size(&c->in);
    if (n == 0)
        return STEP_MORE;
    switch (hello_parse((const uint8_t *)c->in.p + c->in.off, n, (uint8_t *)c->loop->scratch, &h)) {
    case HELLO_MORE:
        return STEP_MORE;
    case HELLO_BAD:
        if (c->front) {
            tls_refuse(c, SSL_AD_DECODE_ERROR);
            return STEP_STOP;
        }
        audit_refusal(c, c->connected ? R_NOT_TLS : R_CLIENT_TLS);
        conn_kill(c);
        return STEP_STOP;
    case HELLO_OK:
        break;
    }
    if (c->front)
        front_hello(c, &h);
    else
        on_hello(c, &h);
    return STEP_STOP;
}

static void shake_hands(struct conn *c)
{
    struct loop *l = c->loop;
    int r = tls_handshake(c);
    if (r == 0 && !c->sock_eof)
        return;
    if (r <= 0) {
        if (!c->front) {
            l->counters[M_HANDSHAKES_FAILED]++;
            audit_refusal(c, R_CLIENT_TLS);
        }
        c->close_after = true; /* the alert is in the buffer */
        conn_mark(c);
        return;
    }
    l->counters[M_HANDSHAKES] += !c->front;
    c->shaking = false;
    conn_give(c, B_HANDSHAKES, 1);
    /* Our reading of the hello and OpenSSL's must be one. */
    const char *seen = SSL_get_servername(c->ssl, TLSEXT_NAMETYPE_host_name);
    struct host name;
    if (seen
        && (host_canonical(seen, strlen(seen), false, &name) != HOST_NAME || name.len != c->to.host.len
            || memcmp(name.text, c->to.host.text, name.len) != 0)) {
        if (!c->front)
            audit_refusal(c, R_HOST_MISMATCH);
        conn_kill(c);
        return;
    }
    const unsigned char *alpn;
    unsigned n;
    SSL_get0_alpn_selected(c->ssl, &alpn, &n);
    if (c->validated) { /* TLS-ALPN-01: the certificate was all */
        c->phase = P_HTTP1;
        conn_finish(c, true);
        return;
    }
    bool h2 = n == 2 && memcmp(alpn, "h2", 2) == 0;
    c->phase = c->pg ? P_POSTGRES : c->my ? P_MYSQL : h2 ? P_HTTP2 : P_HTTP1;
    conn_timer(c, T_HEAD);
    c->head_timer = true;
    conn_mark(c);
    if (h2 && !down2_begin(c)) {
        conn_kill(c);
        return;
    }
    down_run(c);
}

static void reply_connected(struct conn *c)
{
    static const char OK[] = "HTTP/1.1 200 Connection established\r\n\r\n";
    c->connected = true;
    c->phase = P_HELLO;
    conn_timer(c, T_HEAD);
    conn_write(c, OK, sizeof OK - 1);
    conn_again(c);
}

/* The head of a CONNECT. True: taken care of; false: c->x was begun and refused. */
bool down_connect(struct conn *c, const struct head *h, size_t used)
{
    struct host named;
    uint16_t port, named_port;
    enum reason why = R_NONE;
    bool pass = false, mysql = false;
    if (host_parse_authority(h->target.p, h->target.n, &c->to.host, &port) == HOST_INVALID || port == 0)
        why = R_BAD_HOST;
    else if (h->chunked || h->content_length > 0)
        why = R_BAD_REQUEST;
    else if (h->hosts
             && (host_parse_authority(h->authority.p, h->authority.n, &named, &named_port) == HOST_INVALID
                 || strcmp(named.text, c->to.host.text) != 0))
        why = R_HOST_MISMATCH;
    else if (!tenant_may_request(c->tenant, &c->loop->engine->table.limits, c->loop->now_us))
        why = R_RATE;
    if (why == R_NONE) {
        c->to.port = port;
        c->to.tls = true;
        mysql = login_possible(c, RULE_MYSQL);
        why = mysql ? R_NONE : judge(c, true, &pass);
    }
    if (why != R_NONE) {
        xchg_begin(&c->x, c, h);
        c->x.to = c->to;
        c->x.kept_head = used;
        down_fail(&c->x, why, NULL);
        return false;
    }
    buf_take(c->loop, &c->in, used);
    c->head_timer = false;
    if (pass)
        down_pass(c);
    else
        reply_connected(c);
    if (mysql)
        mysql_begin(c);
    return true;
}

void down_pass_ready(struct conn *c, struct conn *up)
{
    c->peer = up;
    up->peer = c;
    up->phase = P_WAIT_PASS;
    if (!c->connected && c->explicit_proxy && !(buf_size(&c->in) && c->in.p[c->in.off] == 0x16)) {
        reply_connected(c); /* the host answered; now its server name must agree */
        return;
    }
    splice_begin(c, up);
}

void down_pass_failed(struct conn *c, enum reason why, const char *detail)
{
    if (c->dead)
        return;
    if (c->front) {
        front_pass_failed(c, why);
        return;
    }
    if (buf_size(&c->in) && c->in.p[c->in.off] == 0x16) {
        c->refused = why;
        terminate(c);
        return;
    }
    c->phase = P_HTTP1;
    xchg_begin(&c->x, c, NULL);
    memcpy(c->x.method, "CONNECT", 8);
    c->x.to = c->to;
    down_fail(&c->x, why, detail);
}

/* How the first bytes of a client of an ingress begin: HTTP/2 without TLS (RFC 9113 3.3), or HTTP/1. */
static enum step detect_http(struct conn *c)
{
    size_t n = buf_size(&c->in), all = NGHTTP2_CLIENT_MAGIC_LEN;
    c->phase = P_HTTP1;
    if (!c->front || memcmp(c->in.p + c->in.off, NGHTTP2_CLIENT_MAGIC, n < all ? n : all) != 0)
        return STEP_AGAIN;
    if (n < all) {
        c->phase = P_DETECT;
        return STEP_MORE;
    }
    c->phase = P_HTTP2;
    if (down2_begin(c))
        return STEP_AGAIN;
    conn_kill(c);
    return STEP_STOP;
}

static void read_to_the_end(struct conn *c)
{
    for (unsigned i = 0; i < 64; i++) {
        ssize_t n = conn_read(c);
        if (n == 0)
            return;
        if (n < 0) {
            conn_kill(c);
            return;
        }
        buf_take(c->loop, &c->in, buf_size(&c->in));
    }
    conn_again(c);
}

void down_run(struct conn *c)
{
    for (;;) {
        enum step s = STEP_STOP;
        if (c->dead)
            return;
        switch (c->phase) {
        case P_DETECT:
            s = STEP_MORE;
            if (buf_size(&c->in) && c->in.p[c->in.off] == 0x16) {
                c->phase = P_HELLO;
                s = STEP_AGAIN;
            } else if (buf_size(&c->in) && !c->in.p[c->in.off] && !c->front) {
                postgres_begin(c);
                s = STEP_AGAIN;
            } else if (buf_size(&c->in)) {
                s = detect_http(c);
            }
            c->head_timer = true;
            break;
        case P_HELLO:
            s = read_hello(c);
            break;
        case P_WAIT_PASS:
            if (c->hung_up || (c->readable_end && c->front))
                conn_lost(c);
            else if (c->pass_refused)
                down_pass_failed(c, R_BUSY, NULL);
            return;
        case P_HANDSHAKE:
            shake_hands(c);
            return;
        case P_HTTP1:
            down1_run(c);
            return;
        case P_HTTP2:
            down2_run(c);
            return;
        case P_POSTGRES:
            postgres_run(c);
            return;
        case P_MYSQL:
            mysql_run(c);
            return;
        case P_TUNNEL:
            tunnel_run(c);
            return;
        case P_SPLICE:
            splice_run(c);
            return;
        case P_LINGER:
            read_to_the_end(c);
            return;
        default:
            return;
        }
        if (s == STEP_STOP)
            return;
        if (s == STEP_MORE) {
            ssize_t n = conn_read(c);
            if (n == 0)
                return;
            if (n < 0) {
                conn_lost(c);
                return;
            }
        }
    }
}
