/* One record a request, allowed or denied, and the counters.
 *
 * Each loop writes to a ring of its own and one thread of the program reads it: no lock. The reader is woken at most four
 * times a second or when the ring is half full, since a wake-up costs more than a request. A full ring loses records and
 * counts them; it never holds up traffic. Values are not recorded, paths and queries only where a rule says so.
 *
 * Layout, little-endian: u16 size of all; u8 kind (0 request, 1 passed through, 2 connection refused, 3 by an ingress, 4
 * passed through by an ingress); u8
 * rules applied; u16 status; u8 reason; u8 HTTP major version, 0 for logins to databases; u8 decision; u16 port; u32 µs taken; i64 µs since 1970; u64
 * bytes up; u64 bytes down; then instance, host, method, credentials, rule, target, each as u8 length and text. By an ingress:
 * the host is the one that the client asked for, and instead of the last three come the id of the ingress, the client and the
 * path without the query.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "loop.h"

enum { RING = 1 << 20, EVERY_MS = 250, RECORD_MAX = 1100 };

struct audit {
    _Alignas(64) atomic_size_t head; /* written by the loop */
    _Alignas(64) atomic_size_t tail; /* written by the reader */
    char ring[RING];
};

struct audit *audit_new(void)
{
    void *p = NULL;
    if (posix_memalign(&p, 64, sizeof(struct audit)) != 0)
        return NULL;
    struct audit *a = p;
    atomic_init(&a->head, 0);
    atomic_init(&a->tail, 0);
    return a;
}

void audit_free(struct audit *a)
{
    free(a);
}

struct writer {
    unsigned char b[RECORD_MAX];
    unsigned n;
};

static void put(struct writer *w, uint64_t v, unsigned bytes)
{
    for (unsigned i = 0; i < bytes; i++)
        w->b[w->n++] = (unsigned char)(v >> (8 * i));
}

static void put_text(struct writer *w, const char *p, size_t n)
{
    w->b[w->n++] = (unsigned char)n;
    memcpy(w->b + w->n, p, n);
    w->n += (unsigned)n;
}

static void wake(struct loop *l)
{
    uint64_t one = 1;
    l->audit_due_ms = 0;
    (void)!write(l->engine->audit_fd, &one, sizeof one);
}

static void append(struct loop *l, struct writer *w)
{
    struct audit *a = l->audit;
    size_t head = atomic_load_explicit(&a->head, memory_order_relaxed);
    size_t used = head - atomic_load_explicit(&a->tail, memory_order_acquire);
    if (RING - used < w->n) {
        l->counters[M_AUDIT_LOST]++;
        return;
    }
    w->b[0] = (unsigned char)w->n;
    w->b[1] = (unsigned char)(w->n >> 8);
    size_t at = head % RING, first = RING - at < w->n ? RING - at : w->n;
    memcpy(a->ring + at, w->b, first);
    memcpy(a->ring, w->b + first, w->n - first);
    atomic_store_explicit(&a->head, head + w->n, memory_order_release);
    if (used + w->n > RING / 2 && used <= RING / 2)
        wake(l);
    else if (!l->audit_due_ms)
        l->audit_due_ms = l->now_ms + EVERY_MS;
}

static void begin_record(struct writer *w, unsigned kind, const struct xchg *x, uint16_t port, enum reason why,
                         int status, int64_t took_us)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_REALTIME_COARSE, &now);
    w->n = 2;
    put(w, kind, 1);
    put(w, x ? x->injected : 0, 1);
    put(w, (uint64_t)status, 2);
    put(w, why, 1);
    put(w, x && (x->to.postgres || x->to.mysql) ? 0 : x && x->down && x->down->h2 ? 2 : 1, 1);
    put(w, x ? x->ruled.decision : 0, 1);
    put(w, port, 2);
    put(w, took_us > UINT32_MAX ? UINT32_MAX : (uint64_t)took_us, 4);
    put(w, (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000, 8);
    put(w, x ? x->up_bytes : 0, 8);
    put(w, x ? x->down_bytes : 0, 8);
}

static void write_record(struct loop *l, unsigned kind, const struct tenant *t, const struct destination *to,
                         const struct xchg *x, enum reason why, int status, int64_t took_us)
{
    struct writer w;
    begin_record(&w, kind, x, to->port, why, status, took_us);
    put_text(&w, t->instance, strlen(t->instance));
    put_text(&w, to->host.text, to->host.kind == HOST_INVALID ? 0 : to->host.len);
    put_text(&w, x ? x->method : "", x ? strlen(x->method) : 0);
    put_text(&w, x ? x->keys : "", x ? strlen(x->keys) : 0);
    put_text(&w, x ? x->ruled.rule : "", x ? strlen(x->ruled.rule) : 0);
    put_text(&w, x ? x->ruled.target : "", x ? strlen(x->ruled.target) : 0);
    append(l, &w);
}

/* A request by an ingress, whichever it was and whether there is one. */
static void write_visit(struct loop *l, const struct xchg *x, int64_t took_us)
{
    static const struct host NONE = {0};
    const struct visit *v = x->visit;
    const struct route *r = v ? v->route : NULL;
    const struct host *host = v && v->host.kind != HOST_INVALID ? &v->host : &NONE;
    char client[INET6_ADDRSTRLEN];
    struct writer w;
    addr_text(x->down->source, client);
    begin_record(&w, x->passed ? 4 : 3, x, x->down->dialled_port, x->reason, x->status, took_us);
    put_text(&w, x->to.host.text, r ? x->to.host.len : 0);
    put_text(&w, host->text, host->len);
    put_text(&w, x->method, strlen(x->method));
    put_text(&w, r ? r->site->ingress : "", r ? strlen(r->site->ingress) : 0);
    put_text(&w, client, strlen(client));
    put_text(&w, v ? v->path : "", v ? v->path_n : 0);
    append(l, &w);
}

void audit_record(struct loop *l, const struct tenant *t, const struct xchg *x)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    int64_t took_us = (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000 - x->started_us;
    if (x->down->front) {
        write_visit(l, x, took_us);
        return;
    }
    unsigned bucket = 0;
    while (bucket < LATENCY_BUCKETS - 1 && took_us >= (int64_t)16 << bucket)
        bucket++;
    l->latency[bucket]++;
    l->counters[M_BYTES_UP] += x->up_bytes;
    l->counters[M_BYTES_DOWN] += x->down_bytes;
    if (x->status >= 200 && x->status < 600)
        l->counters[M_STATUS_2XX + x->status / 100 - 2]++;
    write_record(l, x->passed ? 1 : 0, t, &x->to, x, x->reason, x->status, took_us);
}

void audit_refusal(struct conn *c, enum reason why)
{
    c->loop->denied[why]++;
    c->loop->counters[M_DENIED]++;
    write_record(c->loop, 2, c->tenant, &c->to, NULL, why, 0, 0);
}

void audit_tick(struct loop *l)
{
    wake(l);
}

size_t audit_read(struct audit *a, char *out, size_t cap)
{
    size_t tail = atomic_load_explicit(&a->tail, memory_order_relaxed);
    size_t head = atomic_load_explicit(&a->head, memory_order_acquire), n = 0;
    while (tail < head) {
        size_t size = (unsigned char)a->ring[tail % RING] | (size_t)(unsigned char)a->ring[(tail + 1) % RING] << 8;
        if (n + size > cap)
            break;
        size_t at = tail % RING, first = RING - at < size ? RING - at : size;
        memcpy(out + n, a->ring + at, first);
        memcpy(out + n + first, a->ring, size - first);
        n += size;
        tail += size;
    }
    atomic_store_explicit(&a->tail, tail, memory_order_release);
    return n;
}
