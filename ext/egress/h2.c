/* See h2.h. */
#define _GNU_SOURCE
#include "h2.h"

#include <stdlib.h>
#include <string.h>

#include "loop.h"

void fields_start(struct loop *l, struct fields *f)
{
    fields_free(l, f);
    f->head = malloc(sizeof *f->head);
    if (!f->head)
        abort();
    memset(f->head, 0, offsetof(struct head, f));
    f->head->content_length = -1;
    f->head->minor = 1;
    f->head->http2 = true;
}

/* Until fields_done, strings are kept as offsets: the text may move while it grows. */
static struct str keep(struct loop *l, struct fields *f, const uint8_t *p, size_t n)
{
    struct str s = {(const char *)buf_size(&f->text), (uint32_t)n};
    buf_add(l, &f->text, (const char *)p, n);
    return s;
}

static bool is(const uint8_t *name, size_t n, const char *text)
{
    return n == strlen(text) && memcmp(name, text, n) == 0;
}

bool fields_add(struct loop *l, struct fields *f, const uint8_t *name, size_t n, const uint8_t *value, size_t m)
{
    struct head *h = f->head;
    if (!h || buf_size(&f->text) + n + m > H1_MAX_HEAD)
        return false;
    if (n && name[0] == ':') {
        if (is(name, n, ":method"))
            h->method = keep(l, f, value, m);
        else if (is(name, n, ":path"))
            h->target = keep(l, f, value, m);
        else if (is(name, n, ":authority"))
            h->authority = keep(l, f, value, m), h->hosts = 1;
        else if (is(name, n, ":scheme"))
            return is(value, m, f->plain ? "http" : "https");
        else if (is(name, n, ":status"))
            h->status = (int)h1_content_length((struct str){(const char *)value, (uint32_t)m});
        else
            return false;
        return true;
    }
    if (h->n == H1_MAX_FIELDS || !h1_is_token((const char *)name, n) || !h1_is_field_value((const char *)value, m))
        return false;
    enum h1_field_id id = h1_field_id((const char *)name, n);
    struct str v = {(const char *)value, (uint32_t)m};
    if (id == F_HOST) { /* must equal :authority, which is checked in fields_done */
        if (f->host.n)
            return false;
        f->host = keep(l, f, value, m);
        return m > 0;
    }
    if (id == F_CONTENT_LENGTH) {
        if (h->content_length >= 0 || (h->content_length = h1_content_length(v)) < 0)
            return false;
    } else if (id == F_TE) {
        h->te_trailers = h1_is(v, "trailers");
    } else if (id == F_EXPECT) {
        h->expect_continue = h1_is(v, "100-continue");
        h->expect_other = !h->expect_continue;
    } else if (id == F_TRANSFER_ENCODING || id == F_CONNECTION) {
        return false;
    }
    struct field *at = &h->f[h->n++];
    at->id = id;
    at->name = keep(l, f, name, n);
    at->value = keep(l, f, value, m);
    return true;
}

static void resolve(const struct fields *f, struct str *s)
{
    s->p = f->text.p ? f->text.p + f->text.off + (uintptr_t)s->p : "";
}

/* While strings are still offsets. */
static void join_cookies(struct loop *l, struct fields *f)
{
    struct head *h = f->head;
    unsigned crumbs = 0, kept = 0;
    size_t total = 0;
    for (unsigned i = 0; i < h->n; i++)
        if (h->f[i].id == F_COOKIE) {
            crumbs++;
            total += h->f[i].value.n + 2;
        }
    if (crumbs < 2)
        return;
    buf_need(l, &f->text, total); /* so that the crumbs do not move while they are copied */
    struct str whole = {(const char *)buf_size(&f->text), 0};
    struct field *first = NULL;
    for (unsigned i = 0; i < h->n; i++) {
        struct field *at = &h->f[i];
        if (at->id == F_COOKIE) {
            if (first)
                buf_add(l, &f->text, "; ", 2);
            buf_add(l, &f->text, f->text.p + f->text.off + (uintptr_t)at->value.p, at->value.n);
            if (first)
                continue;
            first = &h->f[kept];
        }
        h->f[kept++] = *at;
    }
    whole.n = (uint32_t)(buf_size(&f->text) - (uintptr_t)whole.p);
    first->value = whole;
    h->n = kept;
}

struct head *fields_done(struct loop *l, struct fields *f)
{
    struct head *h = f->head;
    if (!h || f->done)
        return h;
    f->done = true;
    join_cookies(l, f);
    resolve(f, &h->method);
    resolve(f, &h->target);
    resolve(f, &h->authority);
    resolve(f, &f->host);
    for (unsigned i = 0; i < h->n; i++) {
        resolve(f, &h->f[i].name);
        resolve(f, &h->f[i].value);
    }
    if (f->host.n && !h->authority.n)
        h->authority = f->host;
    else if (f->host.n && !h1_same(f->host, h->authority))
        h->authority.n = 0; /* two names: none */
    return h;
}

void fields_copy(struct loop *l, struct fields *f, const struct head *h)
{
    fields_start(l, f);
    for (unsigned i = 0; i < h->n; i++)
        (void)fields_add(l, f, (const uint8_t *)h->f[i].name.p, h->f[i].name.n, (const uint8_t *)h->f[i].value.p,
                         h->f[i].value.n);
    (void)fields_done(l, f);
}

void fields_free(struct loop *l, struct fields *f)
{
    free(f->head);
    buf_free(l, &f->text);
    *f = (struct fields){0};
}

void pairs_start(struct loop *l, struct pairs *p)
{
    p->names = (struct out){l->scratch, 0, SCRATCH, false};
    p->n = 0;
}

void pairs_add(struct pairs *p, struct str name, struct str value, bool secret)
{
    size_t at = p->names.n;
    out_add(&p->names, name.p, name.n);
    if (p->names.over || p->n == sizeof p->nv / sizeof *p->nv)
        return;
    for (size_t i = at; i < p->names.n; i++)
        if (p->names.p[i] >= 'A' && p->names.p[i] <= 'Z')
            p->names.p[i] = (char)(p->names.p[i] | 0x20);
    p->nv[p->n++] = (nghttp2_nv){(uint8_t *)p->names.p + at, (uint8_t *)(uintptr_t)value.p, name.n, value.n,
                                 secret ? NGHTTP2_NV_FLAG_NO_INDEX : NGHTTP2_NV_FLAG_NONE};
}

/* `written`: the value, which was written behind the names. */
static void add_written(struct pairs *p, const char *name, size_t written)
{
    struct str text = {p->names.p + written, (uint32_t)(p->names.n - written)};
    pairs_add(p, (struct str){name, (uint32_t)strlen(name)}, text, false);
}

void pairs_forwarded(struct pairs *p, const struct forwarded *from)
{
    char client[INET6_ADDRSTRLEN];
    struct str scheme = str_of(from->tls ? "https" : "http");
    size_t at = p->names.n;
    addr_text(from->client, client);
    out_text(&p->names, client);
    add_written(p, "x-forwarded-for", at);
    pairs_add(p, str_of("x-forwarded-proto"), scheme, false);
    pairs_add(p, str_of("x-forwarded-host"), from->authority, false);
    at = p->names.n;
    out_forwarded(&p->names, from);
    add_written(p, "forwarded", at);
}

void pairs_authority(struct pairs *p, const struct destination *to)
{
    size_t at = p->names.n;
    out_authority(&p->names, to);
    add_written(p, ":authority", at);
}

void pairs_number(struct pairs *p, const char *name, uint64_t value)
{
    size_t at = p->names.n;
    out_number(&p->names, value);
    add_written(p, name, at);
}

void pairs_via(struct pairs *p, const struct head *received)
{
    static const char *const TEXT[] = {"1.0 hypeman", "1.1 hypeman", "2 hypeman"};
    const char *text = TEXT[received->http2 ? 2 : received->minor];
    pairs_add(p, (struct str){"via", 3}, (struct str){text, (uint32_t)strlen(text)}, false);
}

void pairs_max_forwards(struct pairs *p, const struct head *h)
{
    int64_t left = max_forwards(h);
    if (left > 0)
        pairs_number(p, "max-forwards", (uint64_t)left - 1);
}

uint32_t h2_end_body(struct conn *c, int32_t stream, const struct head *trailers, const struct route *route)
{
    struct pairs p;
    pairs_start(c->loop, &p);
    for (unsigned i = 0; trailers && i < trailers->n; i++)
        if (route ? forward_trailer_passes(&trailers->f[i], route) : trailer_passes(&trailers->f[i], NULL))
            pairs_add(&p, trailers->f[i].name, trailers->f[i].value, false);
    bool more = p.n && nghttp2_submit_trailer(c->h2, stream, p.nv, p.n) == 0;
    return NGHTTP2_DATA_FLAG_EOF | (more ? NGHTTP2_DATA_FLAG_NO_END_STREAM : 0);
}

nghttp2_session *h2_session(struct conn *c, bool server, nghttp2_session_callbacks *callbacks)
{
    nghttp2_session *s = NULL;
    nghttp2_option *o = NULL;
    if (!callbacks || nghttp2_option_new(&o) != 0)
        return NULL;
    nghttp2_option_set_no_auto_window_update(o, 1); /* windows are granted as the other side takes the bytes */
    nghttp2_option_set_max_send_header_block_length(o, 2 * H1_MAX_HEAD + 65536);
    int r =
        server ? nghttp2_session_server_new2(&s, callbacks, c, o) : nghttp2_session_client_new2(&s, callbacks, c, o);
    nghttp2_option_del(o);
    if (r != 0)
        return NULL;
    c->windowed = conn_take(c, B_WINDOWS, WINDOW_BEYOND);
    uint32_t window = !server ? H2_UP_WINDOW : c->front && c->windowed ? WINDOW : H2_DOWN_WINDOW;
    nghttp2_settings_entry settings[] = {
        {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, window},
        {NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, H2_MAX_STREAMS},
        {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, H1_MAX_HEAD},
        {NGHTTP2_SETTINGS_ENABLE_PUSH, 0},
    };
    if (nghttp2_submit_settings(s, NGHTTP2_FLAG_NONE, settings, server ? 3 : 4) != 0
        || (c->windowed && nghttp2_session_set_local_window_size(s, NGHTTP2_FLAG_NONE, 0, WINDOW) != 0)) {
        nghttp2_session_del(s);
        return NULL;
    }
    return s;
}

void h2_pump(struct conn *c)
{
    while (!c->dead && !c->broken && !conn_wants_room(c)) {
        const uint8_t *p;
        c->in_h2 = true;
        ssize_t n = nghttp2_session_mem_send(c->h2, &p);
        c->in_h2 = false;
        if (n < 0) {
            c->broken = true;
            conn_again(c);
        }
        if (n <= 0)
            return;
        conn_write(c, (const char *)p, (size_t)n);
    }
}

int h2_read(struct conn *c)
{
    for (unsigned turns = 0; turns < 64; turns++) {
        ssize_t n = buf_size(&c->in) ? 1 : conn_read(c); /* some was read to see what it is */
        if (n == 0)
            return 0;
        if (n < 0)
            return -1;
        c->in_h2 = true;
        ssize_t used = nghttp2_session_mem_recv(c->h2, (const uint8_t *)c->in.p + c->in.off, buf_size(&c->in));
        c->in_h2 = false;
        if (used < 0)
            return -1;
        buf_take(c->loop, &c->in, buf_size(&c->in));
        if (c->dead)
            return 0;
    }
    conn_again(c);
    return 0;
}

ssize_t h2_pull(struct loop *l, struct buf *from, uint8_t *out, size_t n)
{
    size_t part = buf_size(from) < n ? buf_size(from) : n;
    memcpy(out, from->p + from->off, part);
    buf_take(l, from, part);
    return (ssize_t)part;
}
