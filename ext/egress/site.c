/* See site.h. */
#define _GNU_SOURCE
#include "site.h"

#include <string.h>

#include "encoded.h"

static const char MAGIC[4] = {'H', 'I', 'G', '1'};

/* Counts labels from the right and notes which are captures. False: too many of either. */
static bool read_shape(struct route *r)
{
    const char *p = r->hostname.p, *end = p + r->hostname.n;
    unsigned labels = 0;
    if (!r->hostname.n || r->hostname.n >= HOST_MAX)
        return false;
    while (end > p) {
        const char *dot = memrchr(p, '.', (size_t)(end - p)), *label = dot ? dot + 1 : p;
        if (label == end)
            return false;
        if (*label == '{') {
            if (labels >= 64)
                return false;
            r->mask |= UINT64_C(1) << (63 - labels);
        }
        labels++;
        end = dot ? dot : p;
    }
    r->labels = (uint8_t)labels;
    r->captured = memchr(r->target.p, '{', r->target.n) != NULL;
    return labels < 128;
}

static struct site *decode(const char *ingress, const uint8_t *data, size_t n)
{
    struct reader r = {data, data + n, false};
    if (n < sizeof MAGIC || memcmp(data, MAGIC, sizeof MAGIC) != 0 || strlen(ingress) >= SITE_ID_MAX)
        return NULL;
    r.p += sizeof MAGIC;
    unsigned routes = (unsigned)read_number(&r, 2);
    if (r.bad || routes > MAX_ROUTES)
        return NULL;
    size_t fixed = sizeof(struct site) + routes * sizeof(struct route);
    size_t size = fixed + n;
    struct site *s = locked_new(&size);
    if (!s)
        return NULL;
    s->size = size;
    atomic_init(&s->refs, 1);
    strcpy(s->ingress, ingress);
    s->n = routes;
    s->routes = (struct route *)(s + 1);
    uint8_t *copy = (uint8_t *)(s->routes + routes);
    memcpy(copy, data, n);
    s->encoded = copy;
    s->encoded_n = n;
    r.p = copy + (r.p - data);
    r.end = copy + n;
    for (unsigned i = 0; i < routes && !r.bad; i++) {
        struct route *at = &s->routes[i];
        at->site = s;
        at->port = (uint16_t)read_number(&r, 2);
        at->target_port = (uint16_t)read_number(&r, 2);
        unsigned tls = (unsigned)read_number(&r, 1);
        at->tls = tls == 1;
        at->pass = tls == 2;
        r.bad |= tls > 2;
        at->redirect = (uint16_t)read_number(&r, 2);
        at->hostname = read_text(&r);
        at->target = read_text(&r);
        at->header = read_text(&r);
        at->value = read_text(&r);
        r.bad |= !h1_is_target(at->hostname.p, at->hostname.n) || !h1_is_target(at->target.p, at->target.n)
            || !read_shape(at) || (at->header.n && !h1_is_token(at->header.p, at->header.n))
            || !h1_is_field_value(at->value.p, at->value.n);
    }
    if (r.bad || r.p != r.end) {
        site_release(s);
        return NULL;
    }
    return s;
}

void site_release(struct site *s)
{
    if (s && atomic_fetch_sub(&s->refs, 1) == 1) {
        locked_free(s, s->size);
    }
}

/* Of the labels that are written out. */
static unsigned slot_of(const char *host, size_t n, uint64_t mask, uint16_t port)
{
    unsigned h = port, labels = 0;
    const char *p = host, *end = host + n;
    while (end > p) {
        const char *dot = memrchr(p, '.', (size_t)(end - p)), *label = dot ? dot + 1 : p;
        bool written = labels >= 64 || !(mask >> (63 - labels) & 1);
        for (; written && label < end; label++)
            h = h * 33 + (unsigned char)*label;
        h = h * 33 + '.';
        labels++;
        end = dot ? dot : p;
    }
    return (h ^ h >> 12) % SITE_SLOTS;
}

static unsigned count_labels(const struct host *h)
{
    unsigned n = 1;
    for (unsigned i = 0; i < h->len; i++)
        n += h->text[i] == '.';
    return n;
}

/* Both have as many labels; those that are written out must be equal. */
static bool matches(const struct route *r, const struct host *h)
{
    const char *p = r->hostname.p, *end = p + r->hostname.n, *q = h->text, *last = q + h->len;
    for (;;) {
        const char *dot = memchr(p, '.', (size_t)(end - p)), *other = memchr(q, '.', (size_t)(last - q));
        size_t n = (size_t)((dot ? dot : end) - p), m = (size_t)((other ? other : last) - q);
        if (*p != '{' && (n != m || memcmp(p, q, n) != 0))
            return false;
        if (!dot || !other)
            return !dot && !other;
        p = dot + 1;
        q = other + 1;
    }
}

static struct str captured(const struct route *r, const struct host *h, struct str name)
{
    const char *p = r->hostname.p, *end = p + r->hostname.n, *q = h->text, *last = q + h->len;
    for (;;) {
        const char *dot = memchr(p, '.', (size_t)(end - p)), *other = memchr(q, '.', (size_t)(last - q));
        size_t n = (size_t)((dot ? dot : end) - p);
        if (*p == '{' && n == name.n + 2 && memcmp(p + 1, name.p, name.n) == 0)
            return (struct str){q, (uint32_t)((other ? other : last) - q)};
        if (!dot || !other)
            return (struct str){NULL, 0};
        p = dot + 1;
        q = other + 1;
    }
}

/* The target with its captures filled in. False: it is longer than any name of an instance. */
static bool fill_in(const struct route *r, const struct host *h, char target[INSTANCE_NAME_MAX])
{
    size_t n = 0;
    for (const char *p = r->target.p, *end = p + r->target.n; p < end;) {
        struct str piece = {p, 1};
        const char *close = *p == '{' ? memchr(p, '}', (size_t)(end - p)) : NULL;
        if (close) {
            piece = captured(r, h, (struct str){p + 1, (uint32_t)(close - p - 1)});
            p = close;
        }
        p++;
        if (!piece.n || n + piece.n >= INSTANCE_NAME_MAX)
            return false;
        memcpy(target + n, piece.p, piece.n);
        n += piece.n;
    }
    target[n] = 0;
    return n > 0;
}

void sites_init(struct sites *s)
{
    memset(s, 0, sizeof *s);
    (void)pthread_mutex_init(&s->lock, NULL);
}

static unsigned id_slot(const char *id)
{
    unsigned h = 0;
    while (*id)
        h = h * 33 + (unsigned char)*id++;
    return (h ^ h >> 12) % SITE_SLOTS;
}

static void count_shape(struct sites *s, const struct route *r, int change)
{
    unsigned i = 0;
    while (i < s->n_shapes
           && (s->shapes[i].mask < r->mask || (s->shapes[i].mask == r->mask && s->shapes[i].labels < r->labels)))
        i++;
    if (i == s->n_shapes || s->shapes[i].mask != r->mask || s->shapes[i].labels != r->labels) {
        memmove(&s->shapes[i + 1], &s->shapes[i], (s->n_shapes - i) * sizeof s->shapes[0]);
        s->n_shapes++;
        s->shapes[i].mask = r->mask;
        s->shapes[i].labels = r->labels;
        s->shapes[i].routes = 0;
    }
    s->shapes[i].routes += (unsigned)change;
    if (!s->shapes[i].routes) {
        s->n_shapes--;
        memmove(&s->shapes[i], &s->shapes[i + 1], (s->n_shapes - i) * sizeof s->shapes[0]);
    }
}

/* All below with the lock held. */
static void take_out(struct sites *s, struct site **at)
{
    struct site *site = *at;
    *at = site->next;
    for (unsigned i = 0; i < site->n; i++) {
        struct route *r = &site->routes[i];
        struct route **link = &s->routes[slot_of(r->hostname.p, r->hostname.n, r->mask, r->port)];
        while (*link != r)
            link = &(*link)->next;
        *link = r->next;
        count_shape(s, r, -1);
    }
    atomic_store(&site->removed, true);
    site_release(site);
}

static struct site **find_id(struct sites *s, const char *ingress)
{
    struct site **at = &s->by_id[id_slot(ingress)];
    while (*at && strcmp((*at)->ingress, ingress) != 0)
        at = &(*at)->next;
    return at;
}

static bool put(struct sites *s, struct site *site)
{
    struct site **old = find_id(s, site->ingress);
    if (*old && (*old)->encoded_n == site->encoded_n && memcmp((*old)->encoded, site->encoded, site->encoded_n) == 0) {
        site_release(site);
        return true;
    }
    if (s->n_shapes + site->n > MAX_SHAPES) {
        site_release(site);
        return false;
    }
    if (*old)
        take_out(s, old);
    struct site **first = &s->by_id[id_slot(site->ingress)];
    site->next = *first;
    *first = site;
    for (unsigned i = 0; i < site->n; i++) {
        struct route *r = &site->routes[i];
        struct route **slot = &s->routes[slot_of(r->hostname.p, r->hostname.n, r->mask, r->port)];
        r->next = *slot;
        *slot = r;
        count_shape(s, r, 1);
    }
    return true;
}

bool sites_put(struct sites *s, const char *ingress, const uint8_t *data, size_t n)
{
    struct site *site = decode(ingress, data, n);
    if (!site)
        return false;
    (void)pthread_mutex_lock(&s->lock);
    bool ok = put(s, site);
    (void)pthread_mutex_unlock(&s->lock);
    return ok;
}

bool sites_drop(struct sites *s, const char *ingress)
{
    (void)pthread_mutex_lock(&s->lock);
    struct site **at = find_id(s, ingress);
    bool known = *at != NULL;
    if (known)
        take_out(s, at);
    (void)pthread_mutex_unlock(&s->lock);
    return known;
}

void sites_destroy(struct sites *s)
{
    for (unsigned i = 0; i < SITE_SLOTS; i++)
        while (s->by_id[i])
            take_out(s, &s->by_id[i]);
    (void)pthread_mutex_destroy(&s->lock);
}

static const struct route *search(const struct sites *s, const struct host *h, uint16_t port)
{
    unsigned labels = count_labels(h);
    for (unsigned i = 0; i < s->n_shapes; i++) {
        if (s->shapes[i].labels != labels)
            continue;
        const struct route *r = s->routes[slot_of(h->text, h->len, s->shapes[i].mask, port)];
        for (; r; r = r->next)
            if (r->port == port && r->labels == labels && r->mask == s->shapes[i].mask && matches(r, h))
                return r;
    }
    return NULL;
}

const struct route *sites_find(struct sites *s, const struct host *h, uint16_t port, char target[INSTANCE_NAME_MAX])
{
    (void)pthread_mutex_lock(&s->lock);
    const struct route *r = search(s, h, port);
    if (r)
        atomic_fetch_add(&r->site->refs, 1);
    (void)pthread_mutex_unlock(&s->lock);
    if (r && !fill_in(r, h, target)) {
        site_release(r->site);
        return NULL;
    }
    return r;
}

bool route_admits(const struct route *r, const struct head *h)
{
    const struct field *found = NULL;
    if (!r->header.n)
        return true;
    for (unsigned i = 0; i < h->n; i++)
        if (h1_same(h->f[i].name, r->header)) {
            if (found)
                return false;
            found = &h->f[i];
        }
    return found && found->value.n == r->value.n && CRYPTO_memcmp(found->value.p, r->value.p, r->value.n) == 0;
}
