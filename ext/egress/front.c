/* Ingresses: connections of clients from the world, and what is decided about their requests.
 *
 * They are carried by the same endpoints as connections of guests (down1.c, up1.c), with other decisions: the instance
 * is looked up for each request in the table of sites (site.h), and its address is requested from the server. The
 * answer is kept until the server reports a change of the instance: each name belongs to one of PLACE_SLOTS
 * generations, and a place or a kept connection of an older generation is not used again.
 *
 * Bounds and kept connections to guests belong to a client's address, so one client cannot take all of either, and none
 * sees another's bytes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "down.h"
#include "forward.h"
#include "hello.h"
#include "loop.h"

enum { AT_ONCE = 16 }; /* connections that a loop accepts before others get a turn */

static atomic_uint_fast64_t *generation_of(struct engine *e, const char *name)
{
    unsigned h = 0;
    while (*name)
        h = h * 33 + (unsigned char)*name++;
    return &e->generations[(h ^ h >> 10) % PLACE_SLOTS];
}

void front_forget(struct engine *e, const char *name)
{
    atomic_fetch_add(generation_of(e, name), 1);
}

void front_forget_all(struct engine *e)
{
    for (unsigned i = 0; i < PLACE_SLOTS; i++)
        atomic_fetch_add(&e->generations[i], 1);
}

uint64_t front_generation(struct loop *l, const struct destination *to)
{
    return atomic_load(generation_of(l->engine, to->host.text));
}

/* In the slot of its generation. With place_lock held. */
static struct place *place_of(struct engine *e, const char *name)
{
    return &e->places[generation_of(e, name) - e->generations];
}

bool front_place(const struct conn *c, struct addr *address)
{
    struct engine *e = c->loop->engine;
    (void)pthread_mutex_lock(&e->place_lock);
    const struct place *p = place_of(e, c->to.host.text);
    bool known = p->generation == c->generation && strcmp(p->name, c->to.host.text) == 0;
    if (known)
        *address = p->address;
    (void)pthread_mutex_unlock(&e->place_lock);
    return known;
}

void front_remember(const struct conn *c, const struct addr *address)
{
    struct engine *e = c->loop->engine;
    (void)pthread_mutex_lock(&e->place_lock);
    struct place *p = place_of(e, c->to.host.text);
    p->name[0] = 0;
    if (address) {
        memcpy(p->name, c->to.host.text, c->to.host.len + 1u);
        p->generation = c->generation;
        p->address = *address;
    }
    (void)pthread_mutex_unlock(&e->place_lock);
}

static void killed(struct conn *c)
{
    c->loop->counters[M_CLIENTS]--;
    xchg_uncount(&c->x);
    visit_end(&c->x);
}

void front_accept(struct loop *l, const struct gate *g)
{
    for (unsigned i = 0; i < AT_ONCE; i++) {
        struct sockaddr_storage from;
        socklen_t n = sizeof from;
        int fd = accept4(g->fd, (struct sockaddr *)&from, &n, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) {
            if (errno == EINTR || errno == ECONNABORTED)
                continue;
            if ((errno == EMFILE || errno == ENFILE) && socket_shed(l, g->fd)) {
                l->counters[M_CLIENTS_REFUSED]++;
                continue;
            }
            return;
        }
        uint16_t port;
        struct addr source = addr_from_sockaddr(&from, &port);
        struct tenant *t = table_client(&l->engine->clients, source);
        if (!t) {
            l->counters[M_CLIENTS_REFUSED]++;
            socket_refuse(fd);
            continue;
        }
        struct conn *c = conn_new(l, DOWN, fd);
        l->counters[M_CLIENTS]++;
        c->front = true;
        c->killed = killed;
        c->side = &DOWN1;
        c->tenant = t;
        c->source = source;
        c->dialled_port = g->port;
        c->phase = P_DETECT;
        if (!conn_count(c)) {
            l->counters[M_CLIENTS_REFUSED]++;
            socket_reset(fd);
            conn_kill(c);
            continue;
        }
        if (!conn_watch(c)) {
            conn_kill(c);
            continue;
        }
        conn_timer(c, T_HEAD);
        conn_run(c); /* its first bytes are there, see TCP_DEFER_ACCEPT in engine.c */
    }
}

void visit_end(struct xchg *x)
{
    struct visit *v = x->visit;
    if (!v)
        return;
    if (v->route)
        site_release(v->route->site);
    free(v->location);
    free(v->proof);
    free(v);
    x->visit = NULL;
}

static void note(struct visit *v, const struct head *h, struct str path)
{
    static const struct str HTML = {"text/html", 9};
    const char *query = memchr(path.p, '?', path.n);
    size_t n = query ? (size_t)(query - path.p) : path.n;
    v->path_n = (uint8_t)(n < sizeof v->path ? n : sizeof v->path);
    memcpy(v->path, path.p, v->path_n);
    for (unsigned i = 0; i < h->n; i++)
        if (h->f[i].name.n == 6 && h1_is(h->f[i].name, "accept")
            && memmem(h->f[i].value.p, h->f[i].value.n, HTML.p, HTML.n))
            v->html = true;
}

/* A public CA that validates the name over plain HTTP. */
static bool find_proof(struct xchg *x, struct str path)
{
    struct str token = acme_token(path);
    struct visit *v = x->visit;
    char proof[PROOF_MAX];
    if (x->down->ssl || !token.n || !certs_proof(&x->down->loop->engine->certs, &v->host, token.p, token.n, proof))
        return false;
    free(v->proof);
    v->proof = strdup(proof);
    return v->proof != NULL;
}

/* Whether the rule is for requests as this one came, over TLS or plain. */
static enum reason check_scheme(struct xchg *x, struct str path)
{
    struct visit *v = x->visit;
    struct conn *c = x->down;
    if (c->ssl)
        return v->route->tls ? R_NONE : R_HOST_MISMATCH; /* it was another rule when the connection began */
    if (v->route->redirect) {
        struct out o = {c->loop->scratch, 0, SCRATCH, false};
        if (!render_location(&o, &v->host, v->route->redirect, path))
            return R_HEAD_TOO_LARGE;
        free(v->location);
        v->location = strdup(o.p);
        return R_MOVED;
    }
    return v->route->tls || v->route->pass ? R_WANTS_TLS : R_NONE;
}

static void note_route(struct xchg *x, const struct route *r, const char *target)
{
    x->visit->route = r;
    x->to.port = r->target_port;
    x->to.host.kind = HOST_NAME;
    x->to.host.len = (uint8_t)strlen(target);
    memcpy(x->to.host.text, target, x->to.host.len + 1u);
}

static struct visit *visit_of(struct xchg *x)
{
    if (!x->visit && !(x->visit = calloc(1, sizeof *x->visit)))
        abort();
    return x->visit;
}

/* What follows the hello is for the instance alone: its bytes are carried unread. */
static void pass(struct conn *c, const struct hello *h, const struct route *r, const char *target)
{
    struct xchg *x = &c->x;
    xchg_begin(x, c, NULL);
    visit_of(x)->host = c->to.host;
    note_route(x, r, target);
    x->passed = true;
    c->to = x->to;
    c->hello_size = h->size;
    down_pass(c);
}

void front_pass_failed(struct conn *c, enum reason why)
{
    c->x.reason = why;
    c->x.status = REASONS[why].status;
    c->x.active = false;
    audit_record(c->loop, c->tenant, &c->x);
    tls_refuse(c, why == R_NO_SITE ? SSL_AD_UNRECOGNIZED_NAME : SSL_AD_INTERNAL_ERROR);
}

/* The hello names the site; errors are reported by an alert. */
void front_hello(struct conn *c, const struct hello *h)
{
    struct engine *e = c->loop->engine;
    char target[INSTANCE_NAME_MAX];
    if (!h->name_len || host_canonical(h->name, h->name_len, false, &c->to.host) != HOST_NAME) {
        tls_refuse(c, SSL_AD_UNRECOGNIZED_NAME);
        return;
    }
    SSL *ssl = h->acme ? certs_session(&e->certs, &c->to.host, true) : NULL; /* a CA that looks for our answer */
    c->prefers_h1 = h->gnutls;
    c->validated = ssl != NULL;
    if (!ssl) {
        const struct route *r = sites_find(&e->sites, &c->to.host, c->dialled_port, target);
        if (r && r->pass) {
            pass(c, h, r, target);
            return;
        }
        bool tls = r && r->tls && !h->acme;
        if (r)
            site_release(r->site);
        ssl = tls ? certs_session(&e->certs, &c->to.host, false) : NULL;
        if (!ssl) {
            tls_refuse(c, tls ? SSL_AD_INTERNAL_ERROR : SSL_AD_UNRECOGNIZED_NAME);
            return;
        }
    }
    c->shaking = conn_take(c, B_HANDSHAKES, 1);
    if (!c->shaking) {
        c->loop->counters[M_CLIENTS_REFUSED]++;
        SSL_free(ssl);
        conn_kill(c);
        return;
    }
    if (!tls_begin(c, ssl, true)) {
        conn_kill(c);
        return;
    }
    c->prefix = c->in;
    c->in = (struct buf){0};
    conn_timer(c, T_HANDSHAKE);
    conn_again(c);
}

enum reason front_decide(struct xchg *x, const struct head *h, struct str *path, uint64_t *generation)
{
    struct conn *c = x->down;
    struct visit *v = visit_of(x);
    char target[INSTANCE_NAME_MAX];
    enum reason why = h->http2 ? site_of_h2(h, &v->host, path) : site_of_h1(h, &v->host, path);
    note(v, h, *path);
    if (why == R_NONE && h->expect_other)
        why = R_EXPECTATION;
    if (why == R_NONE)
        why = check_hops(h);
    if (why == R_NONE && c->ssl
        && (v->host.len != c->to.host.len || memcmp(v->host.text, c->to.host.text, v->host.len) != 0))
        why = R_HOST_MISMATCH;
    if (why == R_NONE && find_proof(x, *path))
        why = R_PROOF;
    if (why != R_NONE)
        return why;
    if (!v->route) { /* it stays while a connection is opened */
        const struct route *r = sites_find(&c->loop->engine->sites, &v->host, c->dialled_port, target);
        if (!r)
            return R_NO_SITE;
        note_route(x, r, target);
    }
    why = check_scheme(x, *path);
    if (why != R_NONE)
        return why;
    if (!route_admits(v->route, h))
        return R_NO_HEADER;
    *generation = front_generation(c->loop, &x->to);
    return R_NONE;
}

struct forwarded front_forwarded(const struct xchg *x, const struct head *h)
{
    const struct conn *c = x->down;
    return (struct forwarded){c->source, c->ssl != NULL, h->authority, x->visit->route->header};
}

bool front_sweep(struct conn *c)
{
    struct xchg *next, *x = &c->x;
    bool swept = false;
    if (c->h2)
        x = c->streams;
    for (; x; x = next) {
        next = x == &c->x ? NULL : x->next;
        if (!x->active || !x->visit || !x->visit->route || !atomic_load(&x->visit->route->site->removed))
            continue;
        up_unpass(c);
        up_abandon(x);
        x->reason = R_DROPPED;
        x->waiting = false;
        x->resp_done = true;
        c->side->fail(x, R_DROPPED, NULL, false);
        swept = true;
    }
    return swept;
}

/* A guest has less time to begin a response than a stream has to be silent. */
void up_timer(struct conn *c)
{
    conn_timer(c, c->front && c->one && !c->one->resp_started ? T_ANSWER : T_STREAM);
}
