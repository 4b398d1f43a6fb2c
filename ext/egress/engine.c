/* The data plane as one object: makes the loops and passes the program's calls on to them. See engine.h. */
#define _GNU_SOURCE
#include "engine.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/crypto.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "loop.h"
#include "transform.h"

static bool parse_network(const char *text, struct network *out)
{
    char address[64];
    const char *slash = strchr(text, '/');
    size_t n = slash ? (size_t)(slash - text) : 0;
    if (!slash || n >= sizeof address)
        return false;
    memcpy(address, text, n);
    address[n] = 0;
    if (!addr_parse(address, &out->base))
        return false;
    long prefix = strtol(slash + 1, NULL, 10) + (strchr(address, ':') ? 0 : 96);
    out->prefix = (uint8_t)prefix;
    return prefix >= 0 && prefix <= 128;
}

static bool read_networks(unsigned n, const char *const *texts, struct network *out, unsigned *count)
{
    for (unsigned i = 0; i < n; i++)
        if (i >= MAX_NETWORKS || !parse_network(texts[i], &out[i]))
            return false;
    *count = n;
    return true;
}

static bool watch(int epoll, int fd, void *who, uint32_t events)
{
    struct epoll_event e = {.events = events, .data.ptr = who};
    return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &e) == 0;
}

static void set_up_listener(int fd)
{
    int one = 1;
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one); /* inherited by what it accepts */
    /* Clients of HTTP and TLS speak first: accept() is deferred until the first bytes arrive (or for a second), which
     * saves a wake-up for each connection. */
    (void)setsockopt(fd, IPPROTO_TCP, TCP_DEFER_ACCEPT, &one, sizeof one);
}

/* A client of MySQL waits for the server to speak. Not undone: other instances may have such rules too. */
static void hear_at_once(struct engine *e)
{
    int none = 0;
    for (unsigned i = 0; i < e->n; i++)
        (void)setsockopt(e->loops[i].listener, IPPROTO_TCP, TCP_DEFER_ACCEPT, &none, sizeof none);
}

static bool make_loop(struct engine *e, struct loop *l, unsigned index, const struct engine_settings *s)
{
    l->engine = e;
    l->bytes_share = e->table.bounds.total[B_BYTES] / e->n;
    l->timers_ms = e->timers_ms;
    l->index = index;
    l->listener = s->listeners[index];
    (void)pthread_mutex_init(&l->inbox_lock, NULL);
    set_up_listener(l->listener);
    l->epoll = epoll_create1(EPOLL_CLOEXEC);
    l->wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    l->reserve = eventfd(0, EFD_CLOEXEC);
    l->mint = mint_new(s->ca_certificate, s->ca_key, s->leaf_cache, tls_server_context);
    l->audit = audit_new();
    l->scratch = malloc(SCRATCH);
    l->room = malloc(TRANSFORM_ROOM);
    return l->epoll >= 0 && l->wake >= 0 && l->mint && l->audit && l->scratch && l->room
        && watch(l->epoll, l->wake, &l->wake, EPOLLIN) && watch(l->epoll, l->listener, &l->listener, 0);
}

/* At most what the process may have, less a reserve for itself. */
static void limit_descriptors(uint64_t *total)
{
    enum { OURS = 256 };
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_max != RLIM_INFINITY && files.rlim_max < *total + OURS)
        *total = files.rlim_max > 2 * OURS ? files.rlim_max - OURS : files.rlim_max / 2;
}

static void set_bounds(struct bounds *b, const uint64_t *each, const uint64_t *all)
{
    uint64_t total[B_WINDOWS];
    memcpy(total, all, sizeof total);
    limit_descriptors(&total[B_DESCRIPTORS]);
    bounds_init(b, each, total);
}

struct engine *engine_new(const struct engine_settings *s, char *error, size_t n)
{
    struct engine *e = calloc(1, sizeof *e);
    struct loop *loops = calloc(s->loops ? s->loops : 1, sizeof *loops);
    error[0] = 0;
    if (!e || !loops) {
        free(e);
        free(loops);
        (void)snprintf(error, n, "out of memory");
        return NULL;
    }
    e->loops = loops;
    e->n = s->loops;
    e->listen_port = s->listen_port;
    e->assumed_tls_port = s->assumed_tls_port;
    e->question_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    e->audit_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    memcpy(e->timers_ms, s->timers_ms, sizeof e->timers_ms);
    (void)pthread_mutex_init(&e->question_lock, NULL);
    table_init(&e->table, (struct limits){s->max_requests, s->max_mints});
    table_init(&e->clients, (struct limits){0, 0});
    sites_init(&e->sites);
    certs_init(&e->certs);
    (void)pthread_mutex_init(&e->place_lock, NULL);
    set_bounds(&e->table.bounds, s->bounds_each, s->bounds_total);
    set_bounds(&e->clients.bounds, s->clients_each, s->clients_total);
    for (unsigned i = 0; i < e->n; i++) {
        loops[i].epoll = loops[i].wake = loops[i].reserve = -1;
        loops[i].listener = s->listeners[i];
    }
    if (!read_networks(s->n_allow, s->allow, e->reach.allow, &e->reach.allowed)
        || !read_networks(s->n_deny, s->deny, e->reach.deny, &e->reach.denied))
        (void)snprintf(error, n, "a network is not address/prefix, or there are more than %d", MAX_NETWORKS);
    if (!error[0])
        e->client = tls_client_context(s->trusted, s->trust_extra, error, n);
    for (unsigned i = 0; i < e->n && !error[0]; i++)
        if (!make_loop(e, &loops[i], i, s))
            (void)snprintf(error, n, "cannot create loop %u (CA certificate and key, or descriptors)", i);
    if (!error[0])
        return e;
    engine_free(e);
    return NULL;
}

bool engine_start(struct engine *e)
{
    for (; e->started < e->n; e->started++) {
        atomic_fetch_add(&e->running, 1);
        if (pthread_create(&e->loops[e->started].thread, NULL, loop_main, &e->loops[e->started]) != 0) {
            atomic_fetch_sub(&e->running, 1);
            return false;
        }
    }
    return true;
}

unsigned engine_running(struct engine *e)
{
    return atomic_load(&e->running);
}

static void order_all(struct engine *e, unsigned orders)
{
    for (unsigned i = 0; i < e->started; i++)
        loop_order(&e->loops[i], orders);
}

void engine_accept(struct engine *e)
{
    order_all(e, ORDER_ACCEPT);
}

void engine_drain(struct engine *e, unsigned grace_ms)
{
    atomic_store(&e->grace_ms, grace_ms);
    order_all(e, ORDER_DRAIN);
}

void engine_join(struct engine *e)
{
    for (; e->started; e->started--)
        (void)pthread_join(e->loops[e->started - 1].thread, NULL);
}

static void free_loop(struct loop *l)
{
    while (l->inbox) {
        struct letter *next = l->inbox->next;
        if (l->inbox->gate)
            gate_release(l->inbox->gate);
        free(l->inbox);
        l->inbox = next;
    }
    buf_free_spares(l);
    mint_free(l->mint);
    audit_free(l->audit);
    free(l->scratch);
    free(l->room);
    if (l->listener >= 0)
        (void)close(l->listener);
    if (l->epoll >= 0)
        (void)close(l->epoll);
    if (l->wake >= 0)
        (void)close(l->wake);
    if (l->reserve >= 0)
        (void)close(l->reserve);
}

/* After engine_join, or before engine_start. */
void engine_free(struct engine *e)
{
    for (unsigned i = 0; i < e->n; i++)
        free_loop(&e->loops[i]);
    while (e->first_question) {
        struct question *next = e->first_question->next;
        free(e->first_question);
        e->first_question = next;
    }
    while (e->first_asked) {
        struct asked *next = e->first_asked->next;
        free(e->first_asked);
        e->first_asked = next;
    }
    while (e->gates) {
        struct gate *next = e->gates->next;
        gate_release(e->gates);
        e->gates = next;
    }
    table_destroy(&e->table);
    table_destroy(&e->clients);
    sites_destroy(&e->sites);
    certs_destroy(&e->certs);
    SSL_CTX_free(e->client);
    (void)close(e->question_fd);
    (void)close(e->audit_fd);
    free(e->loops);
    free(e);
}

int engine_set_policy(struct engine *e, const char *address, const char *instance, const uint8_t *data, size_t n)
{
    struct addr a;
    struct snapshot *s = addr_parse(address, &a) ? snapshot_decode(data, n) : NULL;
    if (s && s->greets)
        hear_at_once(e);
    if (!s || table_set(&e->table, a, instance, s) != 0) {
        errno = EINVAL;
        return -1;
    }
    order_all(e, ORDER_SWEEP);
    return 0;
}

bool engine_remove(struct engine *e, const char *address)
{
    struct addr a;
    if (!addr_parse(address, &a) || !table_remove(&e->table, a))
        return false;
    order_all(e, ORDER_SWEEP);
    return true;
}

uint64_t engine_ask(struct engine *e, unsigned loop, const char *instance, const char *name)
{
    struct question *q = calloc(1, sizeof *q);
    if (!q)
        return 0;
    q->loop = loop;
    strcpy(q->instance, instance);
    strcpy(q->name, name);
    (void)pthread_mutex_lock(&e->question_lock);
    uint64_t token = q->token = ++e->last_token;
    *(e->last_question ? &e->last_question->next : &e->first_question) = q;
    e->last_question = q;
    (void)pthread_mutex_unlock(&e->question_lock);
    uint64_t one = 1;
    (void)!write(e->question_fd, &one, sizeof one);
    return token;
}

static void wake_asker(struct engine *e)
{
    uint64_t one = 1;
    (void)!write(e->question_fd, &one, sizeof one);
}

uint64_t engine_ask_approval(struct engine *e, const struct approval *a)
{
    struct asked *q = calloc(1, sizeof *q);
    if (!q)
        return 0; /* its timer expires */
    q->a = *a;
    (void)pthread_mutex_lock(&e->question_lock);
    uint64_t token = q->a.token = ++e->last_token;
    *(e->last_asked ? &e->last_asked->next : &e->first_asked) = q;
    e->last_asked = q;
    (void)pthread_mutex_unlock(&e->question_lock);
    wake_asker(e);
    return token;
}

bool engine_approval(struct engine *e, struct approval *out)
{
    (void)pthread_mutex_lock(&e->question_lock);
    struct asked *q = e->first_asked;
    if (q) {
        e->first_asked = q->next;
        if (!q->next)
            e->last_asked = NULL;
    }
    (void)pthread_mutex_unlock(&e->question_lock);
    if (!q)
        return false;
    *out = q->a;
    free(q);
    return true;
}

void engine_decide(struct engine *e, unsigned loop, uint64_t token, bool allow)
{
    struct letter *a = loop < e->n ? calloc(1, sizeof *a) : NULL;
    if (!a)
        return; /* its time runs out */
    a->token = token;
    a->kind = LETTER_DECISION;
    a->allow = allow;
    loop_send(&e->loops[loop], a);
}

int engine_question_fd(struct engine *e)
{
    return e->question_fd;
}

bool engine_question(struct engine *e, unsigned *loop, uint64_t *token, char instance[64], char name[256])
{
    (void)pthread_mutex_lock(&e->question_lock);
    struct question *q = e->first_question;
    if (q) {
        e->first_question = q->next;
        if (!q->next)
            e->last_question = NULL;
    }
    (void)pthread_mutex_unlock(&e->question_lock);
    if (!q)
        return false;
    *loop = q->loop;
    *token = q->token;
    strcpy(instance, q->instance);
    strcpy(name, q->name);
    free(q);
    return true;
}

void engine_place(struct engine *e, unsigned loop, uint64_t token, const char *address, bool exists)
{
    struct letter *a = loop < e->n ? calloc(1, sizeof *a) : NULL;
    if (!a)
        return; /* the time for it runs out */
    a->kind = LETTER_PLACE;
    a->token = token;
    a->n = addr_parse(address, &a->addresses[0]) ? 1 : 0;
    a->exists = exists;
    loop_send(&e->loops[loop], a);
}

void engine_answer(struct engine *e, unsigned loop, uint64_t token, unsigned n, const char *const *addresses)
{
    struct letter *a = loop < e->n ? calloc(1, sizeof *a) : NULL;
    if (!a)
        return; /* the time for it runs out */
    a->token = token;
    for (unsigned i = 0; i < n && a->n < MAX_ADDRESSES; i++)
        if (addr_parse(addresses[i], &a->addresses[a->n]))
            a->n++;
    loop_send(&e->loops[loop], a);
}

bool engine_put_site(struct engine *e, const char *ingress, const uint8_t *data, size_t n)
{
    if (!sites_put(&e->sites, ingress, data, n))
        return false;
    order_all(e, ORDER_SWEEP);
    return true;
}

bool engine_drop_site(struct engine *e, const char *ingress)
{
    if (!sites_drop(&e->sites, ingress))
        return false;
    order_all(e, ORDER_SWEEP);
    return true;
}

bool engine_certify(struct engine *e, const char *name, const char *chain, const char *key)
{
    SSL_CTX *ctx = chain ? tls_site_context(chain, key, false) : NULL;
    return (ctx || !chain) && certs_put(&e->certs, name, ctx);
}

bool engine_challenge(struct engine *e, const char *name, const char *token, const char *proof, const char *chain,
                      const char *key)
{
    SSL_CTX *ctx = *chain ? tls_site_context(chain, key, true) : NULL;
    return (ctx || !*chain) && certs_challenge(&e->certs, name, token, proof, ctx);
}

/* A letter to each loop: about a gate, or about an instance. */
static void send_letters(struct engine *e, int kind, struct gate *g, const char *instance)
{
    for (unsigned i = 0; i < e->n; i++) {
        struct letter *a = calloc(1, sizeof *a);
        if (!a)
            abort();
        a->kind = kind;
        a->gate = g;
        if (g)
            atomic_fetch_add(&g->refs, 1);
        strcpy(a->instance, instance);
        loop_send(&e->loops[i], a);
    }
}

bool engine_listen(struct engine *e, int fd, uint16_t port)
{
    struct gate *g = calloc(1, sizeof *g);
    if (!g) {
        (void)close(fd);
        return false;
    }
    set_up_listener(fd);
    atomic_init(&g->refs, 1);
    g->fd = fd;
    g->port = port;
    g->next = e->gates;
    e->gates = g;
    send_letters(e, LETTER_OPEN, g, "");
    return true;
}

void engine_unlisten(struct engine *e, uint16_t port)
{
    for (struct gate **at = &e->gates; *at;) {
        struct gate *g = *at;
        if (g->port != port) {
            at = &g->next;
            continue;
        }
        *at = g->next;
        send_letters(e, LETTER_CLOSE, g, "");
        gate_release(g);
    }
}

void engine_forget(struct engine *e, const char *instance)
{
    if (instance)
        front_forget(e, instance);
    else
        front_forget_all(e);
}

void engine_part(struct engine *e, const char *instance)
{
    if (strlen(instance) < INSTANCE_NAME_MAX)
        send_letters(e, LETTER_PART, NULL, instance);
}

int engine_audit_fd(struct engine *e)
{
    return e->audit_fd;
}

size_t engine_audit_read(struct engine *e, char *out, size_t cap)
{
    size_t n = 0;
    for (unsigned i = 0; i < e->n; i++)
        n += audit_read(e->loops[i].audit, out + n, cap - n);
    return n;
}

uint64_t engine_metric(struct engine *e, enum metric m)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < e->n; i++)
        sum += __atomic_load_n(&e->loops[i].counters[m], __ATOMIC_RELAXED);
    return sum;
}

uint64_t engine_in_use(struct engine *e, enum bound what)
{
    if (what == B_BYTES) {
        int64_t sum = 0;
        for (unsigned i = 0; i < e->n; i++)
            sum += __atomic_load_n(&e->loops[i].bytes, __ATOMIC_RELAXED);
        return (uint64_t)sum;
    }
    return (uint64_t)atomic_load(&e->table.bounds.usage.used[what]);
}

uint64_t engine_largest(struct engine *e, enum bound what, char instance[INSTANCE_MAX])
{
    return (uint64_t)table_largest(&e->table, what, instance);
}

uint64_t engine_limited(struct engine *e, enum bound what)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < e->n; i++)
        sum += __atomic_load_n(&e->loops[i].limited[what], __ATOMIC_RELAXED);
    return sum;
}

uint64_t engine_denied(struct engine *e, unsigned reason)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < e->n && reason < R_COUNT; i++)
        sum += __atomic_load_n(&e->loops[i].denied[reason], __ATOMIC_RELAXED);
    return sum;
}

uint64_t engine_latency(struct engine *e, unsigned bucket)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < e->n && bucket < LATENCY_BUCKETS; i++)
        sum += __atomic_load_n(&e->loops[i].latency[bucket], __ATOMIC_RELAXED);
    return sum;
}

const char *engine_reason(unsigned reason)
{
    return reason < R_COUNT ? REASONS[reason].code : NULL;
}
