/* See policy.h. */
#define _GNU_SOURCE
#include "policy.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "encoded.h"

static const char MAGIC[4] = {'H', 'E', 'G', '3'};

static void read_transform(struct reader *r, struct rule *rule)
{
    unsigned kind = (unsigned)read_number(r, 1), extra;
    rule->kind = (enum rule_kind)kind;
    rule->ready = read_number(r, 1) != 0;
    rule->expires_s = (int64_t)read_number(r, 8);
    rule->name = read_text(r);
    rule->value = read_text(r);
    extra = (unsigned)read_number(r, 1);
    if (kind >= RULE_KINDS || extra > MAX_EXTRA || rule->expires_s < 0) {
        r->bad = true;
        return;
    }
    for (unsigned i = 0; i < MAX_EXTRA; i++)
        rule->extra[i] = i < extra ? read_text(r) : (struct str){"", 0};
    bool named =
        rule->kind == RULE_HEADER ? h1_is_token(rule->name.p, rule->name.n) : h1_is_target(rule->name.p, rule->name.n);
    r->bad |= !named || !h1_is_field_value(rule->value.p, rule->value.n);
    for (unsigned i = 0; i < extra; i++)
        r->bad |= !h1_is_field_value(rule->extra[i].p, rule->extra[i].n);
}

bool rule_is_ready(const struct rule *r, int64_t now_s)
{
    return r->ready && (r->expires_s == 0 || now_s < r->expires_s);
}

/* What follows the credentials, if anything does: u8 private networks, u8 whether rules follow, and these. */
static void read_access(struct snapshot *s, struct reader *r)
{
    unsigned private = (unsigned)read_number(r, 1), present = (unsigned)read_number(r, 1);
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

/* The mapping holds: struct snapshot, rules, patterns, then a copy of the encoding that all strings point into. */
struct snapshot *snapshot_decode(const uint8_t *data, size_t n)
{
    struct reader r = {data, data + n, false};
    if (n < sizeof MAGIC || memcmp(data, MAGIC, sizeof MAGIC) != 0) {
        errno = EINVAL;
        return NULL;
    }
    r.p += sizeof MAGIC;
    unsigned unmatched = (unsigned)read_number(&r, 1), web_only = (unsigned)read_number(&r, 1),
             tls_port = (unsigned)read_number(&r, 2);
    unsigned rules = (unsigned)read_number(&r, 2), patterns = (unsigned)read_number(&r, 2);
    if (r.bad || unmatched > UNMATCHED_DENY || web_only > 1 || rules > MAX_RULES) {
        errno = EINVAL;
        return NULL;
    }
    size_t fixed = sizeof(struct snapshot) + rules * sizeof(struct rule) + patterns * sizeof(struct pattern);
    size_t size = fixed + n;
    struct snapshot *s = locked_new(&size);
    if (!s)
        return NULL;
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
        rule->key = read_text(&r);
        rule->placeholder = read_text(&r);
        read_transform(&r, rule);
        s->greets |= rule->kind == RULE_MYSQL;
        rule->every_host = read_number(&r, 1) != 0;
        rule->ports = read_ports(&r);
        rule->n = (unsigned)read_number(&r, 2);
        rule->patterns = pool;
        if (rule->n > patterns)
            r.bad = true;
        for (unsigned k = 0; k < rule->n && !r.bad; k++) {
            pool->wildcard = read_number(&r, 1) != 0;
            pool->host = read_text(&r);
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

void snapshot_hold(struct snapshot *s)
{
    atomic_fetch_add(&s->refs, 1);
}

void snapshot_release(struct snapshot *s)
{
    if (s && atomic_fetch_sub(&s->refs, 1) == 1) {
        access_free(s->access);
        locked_free(s, s->size);
    }
}

bool rule_covers(const struct rule *r, const struct host *h, uint16_t port)
{
    if (h->kind != HOST_NAME)
        return false; /* credentials are bound to names */
    if (!has_port(r->ports, port))
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
        if (!rule_is_login(&s->rules[i]) && rule_covers(&s->rules[i], h, port))
            return true;
    return false;
}

bool rule_is_login(const struct rule *r)
{
    return r->kind == RULE_POSTGRES || r->kind == RULE_MYSQL;
}

static bool pins(struct str pinned, struct str given)
{
    return pinned.n == given.n && memcmp(pinned.p, given.p, given.n) == 0;
}

const struct rule *snapshot_login(const struct snapshot *s, enum rule_kind kind, const struct host *h, uint16_t port,
                                  struct str user, struct str database)
{
    for (unsigned i = 0; i < s->n; i++) {
        const struct rule *r = &s->rules[i];
        if (r->kind == kind && rule_covers(r, h, port) && pins(r->extra[LOGIN_USER], user)
            && (!r->extra[LOGIN_DATABASE].n || pins(r->extra[LOGIN_DATABASE], database)))
            return r;
    }
    return NULL;
}

const struct pattern *snapshot_login_host(const struct snapshot *s, enum rule_kind kind, uint16_t port,
                                          const char *user)
{
    const struct pattern *found = NULL;
    for (unsigned i = 0; i < s->n; i++) {
        const struct rule *r = &s->rules[i];
        struct str named = {user, user ? (uint32_t)strlen(user) : 0};
        if (r->kind != kind || !has_port(r->ports, port) || (user && !pins(r->extra[LOGIN_USER], named)))
            continue;
        for (unsigned k = 0; k < r->n; k++) {
            if (r->patterns[k].wildcard || (found && !pins(found->host, r->patterns[k].host)))
                return NULL;
            found = &r->patterns[k];
        }
        if (r->every_host)
            return NULL;
    }
    return found;
}

bool snapshot_logs_in(const struct snapshot *s, enum rule_kind kind, const struct host *h, uint16_t port)
{
    for (unsigned i = 0; i < s->n; i++)
        if (s->rules[i].kind == kind && rule_covers(&s->rules[i], h, port))
            return true;
    return false;
}

bool snapshot_is_login(const struct snapshot *s, const struct host *h, uint16_t port)
{
    return snapshot_logs_in(s, RULE_POSTGRES, h, port) || snapshot_logs_in(s, RULE_MYSQL, h, port);
}

bool snapshot_greets(const struct snapshot *s, uint16_t port)
{
    for (unsigned i = 0; s->greets && i < s->n; i++)
        if (s->rules[i].kind == RULE_MYSQL && has_port(s->rules[i].ports, port))
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

static void tenant_free(struct tenant *t)
{
    snapshot_release(t->snapshot);
    (void)pthread_mutex_destroy(&t->lock);
    free(t);
}

/* The table of clients holds none of them: the last one to let go takes it out, so that nobody finds it meanwhile. */
static void client_release(struct tenant *t)
{
    struct table *table = t->clients;
    (void)pthread_mutex_lock(&table->lock);
    bool last = atomic_fetch_sub(&t->refs, 1) == 1;
    struct tenant **at = &table->slots[slot_of(t->source)];
    while (last && *at != t)
        at = &(*at)->next;
    if (last)
        *at = t->next;
    (void)pthread_mutex_unlock(&table->lock);
    if (last)
        tenant_free(t);
}

void tenant_release(struct tenant *t)
{
    if (t->clients)
        client_release(t);
    else if (atomic_fetch_sub(&t->refs, 1) == 1)
        tenant_free(t);
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

/* With the lock held. */
static struct tenant *tenant_new(struct table *table, struct addr source)
{
    struct tenant *t = calloc(1, sizeof *t);
    if (!t)
        return NULL;
    t->source = source;
    t->bounds = &table->bounds;
    t->id = ++table->last_id;
    atomic_init(&t->refs, 1);
    (void)pthread_mutex_init(&t->lock, NULL);
    struct tenant **at = &table->slots[slot_of(source)];
    t->next = *at;
    *at = t;
    return t;
}

int64_t table_largest(struct table *table, enum bound what, char instance[INSTANCE_MAX])
{
    int64_t most = 0;
    instance[0] = 0;
    (void)pthread_mutex_lock(&table->lock);
    for (unsigned i = 0; i < sizeof table->slots / sizeof *table->slots; i++)
        for (struct tenant *t = table->slots[i]; t; t = t->next) {
            int64_t used = atomic_load_explicit(&t->usage.used[what], memory_order_relaxed);
            if (used > most) {
                most = used;
                memcpy(instance, t->instance, INSTANCE_MAX);
            }
        }
    (void)pthread_mutex_unlock(&table->lock);
    return most;
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
        t = strlen(instance) < INSTANCE_MAX ? tenant_new(table, source) : NULL;
        if (!t) {
            (void)pthread_mutex_unlock(&table->lock);
            snapshot_release(s);
            return -1;
        }
        strcpy(t->instance, instance);
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

struct tenant *table_client(struct table *table, struct addr source)
{
    if (!addr_is_v4(source))
        memset(source.b + 8, 0, 8);
    (void)pthread_mutex_lock(&table->lock);
    struct tenant *t = *find(table, source);
    if (t) {
        tenant_hold(t);
    } else {
        t = tenant_new(table, source);
        if (t)
            t->clients = table;
    }
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
