/* See policy.h. */
#define _GNU_SOURCE
#include "policy.h"

#include <errno.h>
#include <openssl/crypto.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static const char MAGIC[4] = {'H', 'E', 'G', '3'};

struct reader {
    const uint8_t *p, *end;
    bool bad;
};

static uint64_t number(struct reader *r, unsigned bytes)
{
    uint64_t v = 0;
    if ((size_t)(r->end - r->p) < bytes) {
        r->bad = true;
        return 0;
    }
    for (unsigned i = 0; i < bytes; i++)
        v |= (uint64_t)*r->p++ << (8 * i);
    return v;
}

static struct str text(struct reader *r)
{
    unsigned n = (unsigned)number(r, 2);
    if (r->bad || (size_t)(r->end - r->p) < n) {
        r->bad = true;
        return (struct str){"", 0};
    }
    struct str s = {(const char *)r->p, n};
    r->p += n;
    return s;
}

static void read_transform(struct reader *r, struct rule *rule)
{
    unsigned kind = (unsigned)number(r, 1), extra;
    rule->kind = (enum rule_kind)kind;
    rule->ready = number(r, 1) != 0;
    rule->expires_s = (int64_t)number(r, 8);
    rule->name = text(r);
    rule->value = text(r);
    extra = (unsigned)number(r, 1);
    if (kind >= RULE_KINDS || extra > MAX_EXTRA || rule->expires_s < 0) {
        r->bad = true;
        return;
    }
    for (unsigned i = 0; i < MAX_EXTRA; i++)
        rule->extra[i] = i < extra ? text(r) : (struct str){"", 0};
    bool named = rule->kind == RULE_HEADER ? h1_is_token(rule->name.p, rule->name.n)
                                           : h1_is_target(rule->name.p, rule->name.n);
    r->bad |= !named || !h1_is_field_value(rule->value.p, rule->value.n);
    for (unsigned i = 0; i < extra; i++)
        r->bad |= !h1_is_field_value(rule->extra[i].p, rule->extra[i].n);
}

bool rule_is_ready(const struct rule *r, int64_t now_s)
{
    return r->ready && (r->expires_s == 0 || now_s < r->expires_s);
}

/* The mapping holds: struct snapshot, rules, patterns, then a copy of the encoding that all strings point into. */
static size_t round_up(size_t n)
{
    return (n + 4095) & ~(size_t)4095;
}

/* What follows the credentials, if anything does: u8 private networks, u8 whether rules follow, and these. */
static void read_access(struct snapshot *s, struct reader *r)
{
    unsigned private = number(r, 1), present = number(r, 1);
    if (private > PRIVATE_CLOSED || present > 1 || r->bad) {
        r->bad = true;
        return;
    }
    s->private = (enum private)private;
    if (!present)
        return;
    s->access = access_decode(r->p, (size_t)(r->end - r->p));
    r->bad = !s->access;
    r->p = r->end;
}

struct snapshot *snapshot_decode(const uint8_t *data, size_t n)
{
    struct reader r = {data, data + n, false};
    if (n < sizeof MAGIC || memcmp(data, MAGIC, sizeof MAGIC) != 0) {
        errno = EINVAL;
        return NULL;
    }
    r.p += sizeof MAGIC;
    unsigned unmatched = (unsigned)number(&r, 1), web_only = (unsigned)number(&r, 1), tls_port = (unsigned)number(&r, 2);
    unsigned rules = (unsigned)number(&r, 2), patterns = (unsigned)number(&r, 2);
    if (r.bad || unmatched > UNMATCHED_DENY || web_only > 1 || rules > MAX_RULES) {
        errno = EINVAL;
        return NULL;
    }
    size_t fixed = sizeof(struct snapshot) + rules * sizeof(struct rule) + patterns * sizeof(struct pattern);
    size_t size = round_up(fixed + n);
    char *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED)
        return NULL;
    (void)mlock(map, size); /* best effort: RLIMIT_MEMLOCK may be small */
    (void)madvise(map, size, MADV_DONTDUMP);
    struct snapshot *s = (struct snapshot *)map;
    s->size = size;
    atomic_init(&s->refs, 1);
    s->unmatched = (enum unmatched)unmatched;
    s->web_only = web_only;
    s->tls_port = (uint16_t)tls_port;
    s->n = rules;
    s->rules = (struct rule *)(s + 1);
    struct pattern *pool = (struct pattern *)(s->rules + rules);
    uint8_t *copy = (uint8_t *)(pool + patterns);
    memcpy(copy, data, n);
    s->encoded = copy;
    s->encoded_n = n;
    r.p = copy + (r.p - data);
    r.end = copy + n;
    for (unsigned i = 0; i < rules && !r.bad; i++) {
        struct rule *rule = &s->rules[i];
        rule->key = text(&r);
        rule->placeholder = text(&r);
        read_transform(&r, rule);
        rule->every_host = number(&r, 1) != 0;
        rule->port_count = (unsigned)number(&r, 1);
        rule->ports = r.p;
        for (unsigned k = 0; k < rule->port_count; k++)
            (void)number(&r, 2);
        rule->n = (unsigned)number(&r, 2);
        rule->patterns = pool;
        if (rule->n > patterns)
            r.bad = true;
        for (unsigned k = 0; k < rule->n && !r.bad; k++) {
            pool->wildcard = number(&r, 1) != 0;
            pool->host = text(&r);
            pool++;
            patterns--;
        }
    }
    if (!r.bad && r.p != r.end)
        read_access(s, &r);
    if (r.bad || r.p != r.end || patterns) {
        snapshot_release(s);
        errno = EINVAL;
        return NULL;
    }
    return s;
}

void snapshot_release(struct snapshot *s)
{
    if (s && atomic_fetch_sub(&s->refs, 1) == 1) {
        size_t size = s->size;
        access_free(s->access);
        OPENSSL_cleanse(s, size);
        (void)munmap(s, size);
    }
}

bool rule_covers(const struct rule *r, const struct host *h, uint16_t port)
{
    if (h->kind != HOST_NAME)
        return false; /* credentials are bound to names */
    bool here = false;
    for (unsigned i = 0; i < r->port_count; i++)
        here |= (r->ports[2 * i] | r->ports[2 * i + 1] << 8) == port;
    if (!here)
        return false;
    if (r->every_host)
        return true;
    for (unsigned i = 0; i < r->n; i++)
        if (host_matches(r->patterns[i].host.p, r->patterns[i].host.n, r->patterns[i].wildcard, h->text, h->len))
            return true;
    return false;
}

bool snapshot_allows_port(const struct snapshot *s, const struct host *h, uint16_t port, bool tls, int64_t now_s)
{
    return !s->web_only || port == (tls ? s->tls_port : 80) || snapshot_covers(s, h, port)
        || (s->access && access_names_port(s->access, h, port, now_s));
}

bool snapshot_covers(const struct snapshot *s, const struct host *h, uint16_t port)
{
    for (unsigned i = 0; i < s->n; i++)
        if (rule_covers(&s->rules[i], h, port))
            return true;
    return false;
}

static unsigned slot_of(struct addr a)
{
    unsigned h = 0;
    for (unsigned i = 0; i < 16; i++)
        h = h * 31 + a.b[i];
    return (h ^ h >> 8) & 255;
}

void table_init(struct table *t, struct limits limits)
{
    memset(t, 0, sizeof *t);
    (void)pthread_mutex_init(&t->lock, NULL);
    t->limits = limits;
}

void tenant_hold(struct tenant *t)
{
    atomic_fetch_add(&t->refs, 1);
}

void tenant_release(struct tenant *t)
{
    if (atomic_fetch_sub(&t->refs, 1) == 1) {
        snapshot_release(t->snapshot);
        (void)pthread_mutex_destroy(&t->lock);
        free(t);
    }
}

/* With the table's lock held: cuts the tenant out, wipes its rules; living connections keep only the shell. */
static void cut(struct tenant **at)
{
    struct tenant *t = *at;
    *at = t->next;
    atomic_store(&t->removed, true);
    (void)pthread_mutex_lock(&t->lock);
    struct snapshot *old = t->snapshot;
    t->snapshot = NULL;
    (void)pthread_mutex_unlock(&t->lock);
    snapshot_release(old);
    tenant_release(t);
}

static struct tenant **find(struct table *t, struct addr source)
{
    struct tenant **at = &t->slots[slot_of(source)];
    while (*at && memcmp((*at)->source.b, source.b, 16) != 0)
        at = &(*at)->next;
    return at;
}

int table_set(struct table *table, struct addr source, const char *instance, struct snapshot *s)
{
    (void)pthread_mutex_lock(&table->lock);
    struct tenant **at = find(table, source), *t = *at;
    if (t && strcmp(t->instance, instance) != 0) {
        cut(at);
        t = NULL;
    }
    if (!t) {
        t = calloc(1, sizeof *t);
        if (!t || strlen(instance) >= INSTANCE_MAX) {
            free(t);
            (void)pthread_mutex_unlock(&table->lock);
            snapshot_release(s);
            return -1;
        }
        strcpy(t->instance, instance);
        t->source = source;
        t->id = ++table->last_id;
        atomic_init(&t->refs, 1);
        (void)pthread_mutex_init(&t->lock, NULL);
        at = &table->slots[slot_of(source)];
        t->next = *at;
        *at = t;
    }
    (void)pthread_mutex_lock(&t->lock);
    struct snapshot *old = t->snapshot;
    if (old && old->encoded_n == s->encoded_n && memcmp(old->encoded, s->encoded, s->encoded_n) == 0) {
        old = s;
    } else {
        t->snapshot = s;
        atomic_fetch_add(&t->generation, 1);
    }
    (void)pthread_mutex_unlock(&t->lock);
    (void)pthread_mutex_unlock(&table->lock);
    snapshot_release(old);
    return 0;
}

bool table_remove(struct table *t, struct addr source)
{
    (void)pthread_mutex_lock(&t->lock);
    struct tenant **at = find(t, source);
    bool known = *at != NULL;
    if (known)
        cut(at);
    (void)pthread_mutex_unlock(&t->lock);
    return known;
}

void table_destroy(struct table *t)
{
    for (unsigned i = 0; i < 256; i++)
        while (t->slots[i])
            cut(&t->slots[i]);
    (void)pthread_mutex_destroy(&t->lock);
}

struct tenant *table_enter(struct table *table, struct addr source)
{
    (void)pthread_mutex_lock(&table->lock);
    struct tenant *t = *find(table, source);
    if (t)
        tenant_hold(t);
    (void)pthread_mutex_unlock(&table->lock);
    return t;
}

struct snapshot *tenant_borrow(struct tenant *t, uint64_t *generation)
{
    (void)pthread_mutex_lock(&t->lock);
    struct snapshot *s = t->snapshot;
    if (s)
        atomic_fetch_add(&s->refs, 1);
    *generation = atomic_load(&t->generation);
    (void)pthread_mutex_unlock(&t->lock);
    return s;
}

static bool take(struct tenant *t, struct bucket *b, unsigned rate, int64_t now_us)
{
    if (rate == 0)
        return true;
    (void)pthread_mutex_lock(&t->lock);
    double burst = rate * 2.0;
    b->level += (double)(now_us - b->at_us) * rate / 1e6;
    b->at_us = now_us;
    if (b->level > burst)
        b->level = burst;
    bool ok = b->level >= 1;
    if (ok)
        b->level -= 1;
    (void)pthread_mutex_unlock(&t->lock);
    return ok;
}

bool tenant_may_request(struct tenant *t, const struct limits *l, int64_t now_us)
{
    return take(t, &t->requests, l->requests, now_us);
}

bool tenant_may_mint(struct tenant *t, const struct limits *l, int64_t now_us)
{
    return take(t, &t->mints, l->mints, now_us);
}
