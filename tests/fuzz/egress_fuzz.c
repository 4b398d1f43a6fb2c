/* Fuzz target for everything of the egress path that reads bytes of guests or hosts: heads, trailers, chunks, the
 * ClientHello, hosts and authorities, what is made of a request's head, header blocks of HTTP/2; the snapshots that our
 * own program writes; messages of Postgres, SCRAM and MySQL; the same for what clients send by ingresses, and what the
 * control protocol brings for these. The first byte of the input selects the parser.
 *
 *   clang -g -O1 -fsanitize=fuzzer,address,undefined -D_GNU_SOURCE -Iext/egress tests/fuzz/egress_fuzz.c ext/egress/[!.]*.c \
 *         -lssl -lcrypto -lnghttp2 -lpthread -o build/fuzz-egress
 *   build/fuzz-egress -max_len=40000 tests/fuzz/egress
 *
 * Checked besides crashes: what is parsed is inside the input; a message read whole is the same message when it arrives
 * in two pieces; an accepted value contains nothing that could end a line; what is passed on has one Host and one
 * credential. With -DWITH_LLHTTP, llhttp_opinion.c and the sources of llhttp 9, llhttp must read all that we accept in
 * the same way.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "certs.h"
#include "h2.h"
#include "hello.h"
#include "mywire.h"
#include "pgwire.h"
#include "probe.h"
#include "scram.h"
#include "scrub.h"

#ifdef WITH_LLHTTP
#include "llhttp_opinion.h"
#endif

#define MUST(x)      \
    do {             \
        if (!(x))    \
            abort(); \
    } while (0)

static void inside(struct str s, const char *p, size_t n)
{
    MUST(s.n == 0 || (s.p >= p && s.p + s.n <= p + n));
    for (uint32_t i = 0; i < s.n; i++)
        MUST(s.p[i] != '\r' && s.p[i] != '\n' && s.p[i] != 0);
}

#ifdef WITH_LLHTTP
/* A head that we took is one head for llhttp, too. */
static void agree(bool response, const struct head *h, const char *p, size_t used)
{
    struct opinion o = llhttp_opinion(response, p, used, NULL, 0);
    if (o.unknown || o.odd_target) /* ours is judged later, by target_of_h1 */
        return;
    MUST(!o.refused && o.head && o.fields == h->n && o.major == 1 && (int)o.minor == h->minor);
    MUST(o.chunked == h->chunked && o.length == (h->content_length >= 0));
    MUST(response ? (int)o.status == h->status
                  : h->method.n == strlen(o.method) && !memcmp(h->method.p, o.method, h->method.n));
}

/* And so is a chunked body; an empty trailer section is added to it. */
static void agree_on_body(const char *p, size_t n, uint64_t sum)
{
    static char body[65536];
    static const char HEAD[] = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    if (n + 2 > sizeof body)
        return;
    memcpy(body, p, n);
    memcpy(body + n, "\r\n", 2);
    struct opinion o = llhttp_opinion(false, HEAD, sizeof HEAD - 1, body, n + 2);
    if (o.refused && memchr(p, ';', n)) /* extensions are dropped here whatever they say; it knows their grammar */
        return;
    MUST(!o.refused && o.message && o.sum == sum);
}
#endif

typedef int (*parser)(const char *, size_t, struct head *);

static void head(parser parse, const char *p, size_t n)
{
    static struct head h, again;
    int used = parse(p, n, &h);
    MUST(used <= (int)n);
    if (used > 0) {
        inside(h.method, p, n);
        inside(h.target, p, n);
        inside(h.authority, p, n);
        inside(h.reason, p, n);
        MUST(h.n <= H1_MAX_FIELDS && !(h.chunked && h.content_length >= 0));
        for (unsigned i = 0; i < h.n; i++) {
            inside(h.f[i].name, p, n);
            inside(h.f[i].value, p, n);
            MUST(h1_is_token(h.f[i].name.p, h.f[i].name.n) && h1_is_field_value(h.f[i].value.p, h.f[i].value.n));
        }
        MUST(used >= 2 && p[used - 2] == '\r' && p[used - 1] == '\n');
        MUST(parse(p, (size_t)used, &again) == used);
        for (size_t cut = (size_t)used > 64 ? (size_t)used - 64 : 0; cut < (size_t)used; cut++)
            MUST(parse(p, cut, &again) == 0); /* no proper beginning of it is a message or refused */
#ifdef WITH_LLHTTP
        if (parse != h1_parse_trailers)
            agree(parse == h1_parse_response, &h, p, (size_t)used);
#endif
    } else if (used < 0 && n < 4096) {
        MUST(parse(p, n, &again) == used);
    }
}

/* All body bytes of a chunked message; the pieces' length varies with `step`. */
static int chunks(const char *p, size_t n, size_t step, uint64_t *sum, size_t *end)
{
    struct h1_chunked d = {0};
    size_t at = 0, have = step < n ? step : n;
    *sum = 5381;
    for (;;) {
        struct str data = {NULL, 0};
        size_t used = 0;
        enum h1_chunk_event e = h1_chunked_next(&d, p + at, have - at, &used, &data);
        if (e == H1_CHUNK_BAD)
            return -1;
        MUST(used <= have - at);
        if (e == H1_CHUNK_DATA) {
            MUST(data.p >= p + at && data.p + data.n <= p + at + used && data.n);
            for (uint32_t i = 0; i < data.n; i++)
                *sum = *sum * 33 + (unsigned char)data.p[i];
        }
        at += used;
        if (e == H1_CHUNK_TRAILERS) {
            *end = at;
            return 1;
        }
        if (e == H1_CHUNK_MORE) {
            MUST(at == have);
            if (have == n)
                return 0;
            have = have + step < n ? have + step : n;
        }
    }
}

static void chunked(const char *p, size_t n)
{
    uint64_t whole, pieces;
    size_t end = 0, end2 = 0;
    int a = chunks(p, n, n + 1, &whole, &end);
    for (size_t step = 1; step < 4; step++) {
        int b = chunks(p, n, step, &pieces, &end2);
        MUST(a == b && (a < 0 || whole == pieces) && (a <= 0 || end == end2));
    }
#ifdef WITH_LLHTTP
    if (a == 1)
        agree_on_body(p, end, whole);
#endif
}

static void hello(const uint8_t *p, size_t n)
{
    static uint8_t scratch[HELLO_MAX];
    struct hello h, again;
    enum hello_result r = hello_parse(p, n, scratch, &h);
    MUST(h.name_len < sizeof h.name);
    if (r != HELLO_OK)
        return;
    MUST(!memchr(h.name, 0, h.name_len));
    for (size_t cut = n > 32 ? n - 32 : 0; cut < n; cut++) {
        enum hello_result s = hello_parse(p, cut, scratch, &again);
        MUST(s == HELLO_MORE || (s == HELLO_OK && again.name_len == h.name_len));
    }
}

static void host(const char *p, size_t n)
{
    struct host h, again;
    uint16_t port;
    if (host_parse_authority(p, n, &h, &port) == HOST_INVALID)
        return;
    MUST(h.len == strlen(h.text) && h.len > 0);
    for (unsigned i = 0; i < h.len; i++)
        MUST(!strchr("%#?@/\\ []\"", h.text[i]) && (unsigned char)h.text[i] > 0x20 && (unsigned char)h.text[i] < 0x7f
             && !(h.text[i] >= 'A' && h.text[i] <= 'Z'));
    /* The canonical form is its own canonical form. */
    MUST(host_canonical(h.text, h.len, strchr(h.text, ':') != NULL, &again) == h.kind && !strcmp(h.text, again.text));
    struct addr a;
    MUST((h.kind == HOST_IP) == addr_parse(h.text, &a));
}

/* One credential for api.example.com and *.b.c in Authorization, as hypeman/egress/policy.py writes it. */
static const uint8_t RULES[] = "HEG3\0\0\273\1\1\0\2\0"
                               "\3\0KEY"
                               "\10\0mock-KEY"
                               "\0\1\0\0\0\0\0\0\0\0"
                               "\15\0authorization"
                               "\11\0Bearer sk"
                               "\0"
                               "\0\1\273\1\2\0"
                               "\0\17\0api.example.com"
                               "\1\3\0b.c";

static unsigned count(const struct head *h, enum h1_field_id id)
{
    unsigned n = 0;
    for (unsigned i = 0; i < h->n; i++)
        n += h->f[i].id == id;
    return n;
}

/* What is passed on to the host reads as one request with the rule's credential and no other. */
static void request(const char *p, size_t n)
{
    static char out[131072];
    static struct head h;
    static const char *const NAMES[] = {"api.example.com", "x.b.c", "other.test", NULL};
    if (n < 1)
        return;
    const char *name = NAMES[p[0] & 3], *why;
    struct probe_origin from = {name, (p[0] & 4) != 0, p[0] & 8 ? 8443 : 443};
    size_t out_n = sizeof out;
    int used = probe_head(p + 1, n - 1, RULES, sizeof RULES - 1, &from, NULL, 0, 0, out, &out_n, &why);
    if (used <= 0)
        return;
    MUST(h1_parse_request(out, out_n, &h) == (int)out_n && h.hosts == 1);
#ifdef WITH_LLHTTP
    MUST(!llhttp_opinion(false, out, out_n, NULL, 0).odd_target);
    agree(false, &h, out, out_n);
#endif
    bool real = false;
    for (unsigned i = 0; i < h.n; i++)
        real |= h.f[i].id == F_AUTHORIZATION && h1_same(h.f[i].value, (struct str){"Bearer sk", 9});
    bool ruled = name && from.port == 443 && (name[0] == 'a' || name[0] == 'x');
    MUST(real <= ruled && (!ruled || (real && count(&h, F_AUTHORIZATION) == 1 && !count(&h, F_COOKIE))));
}

/* The same rule for sigv4, with the key "AKID" and "verysecret". */
static const uint8_t SIGNING[] = "HEG3\0\0\273\1\1\0\1\0"
                                 "\3\0KEY"
                                 "\10\0mock-KEY"
                                 "\2\1\0\0\0\0\0\0\0\0"
                                 "\15\0authorization"
                                 "\12\0verysecret"
                                 "\4"
                                 "\4\0AKID"
                                 "\0\0"
                                 "\11\0us-east-1"
                                 "\2\0s3"
                                 "\0\1\273\1\1\0"
                                 "\0\17\0api.example.com";

/* A head and the body behind it: what is signed reads as one request, and the key is not in it. */
static void signing(const char *p, size_t n)
{
    static char out[131072];
    static struct head h;
    const char *end = memmem(p, n, "\r\n\r\n", 4), *why;
    if (!end)
        return;
    size_t used = (size_t)(end - p) + 4, body_n = n - used, out_n = sizeof out;
    char *body = malloc(body_n + 1);
    if (!body)
        abort();
    memcpy(body, p + used, body_n);
    struct probe_origin from = {"api.example.com", false, 443};
    if (probe_head(p, used, SIGNING, sizeof SIGNING - 1, &from, body, body_n, 1440938160, out, &out_n, &why) > 0) {
        MUST(h1_parse_request(out, out_n, &h) == (int)out_n && count(&h, F_AUTHORIZATION) <= 1);
        MUST(!memmem(out, out_n, "verysecret", 10) || memmem(p, used, "verysecret", 10));
        for (unsigned i = 0; i < h.n; i++)
            MUST(h.f[i].id != F_AUTHORIZATION
                 || memmem(h.f[i].value.p, h.f[i].value.n, "Credential=AKID/20150830/", 25));
    }
    free(body);
}

static void snapshot(const uint8_t *p, size_t n)
{
    struct host h;
    struct snapshot *s = snapshot_decode(p, n);
    if (!s)
        return;
    MUST(s->n <= MAX_RULES && host_canonical("api.example.com", 15, false, &h) == HOST_NAME);
    (void)snapshot_covers(s, &h, 443);
    snapshot_release(s);
}

/* Rules, then a request that they decide about; a path has one spelling, in which it is its own. */
static void access_rules(const uint8_t *p, size_t n)
{
    static char room[H1_MAX_HEAD], again[H1_MAX_HEAD];
    size_t rules = n > 2 ? (size_t)p[0] | (size_t)p[1] << 8 : n;
    if (n < 3 || rules > n - 2 || n - 2 - rules > sizeof room)
        return;
    struct str target = {(const char *)p + 2 + rules, (uint32_t)(n - 2 - rules)};
    if (h1_is_target(target.p, target.n)) {
        struct str path = access_path(target, room);
        if (path.p && path.n && path.p[0] == '/') {
            MUST(path.n <= (target.n ? target.n : 1) && !memchr(path.p, '\\', path.n));
            MUST(!memmem(path.p, path.n, "/../", 4) && !memmem(path.p, path.n, "//", 2));
            struct str same = access_path(path, again);
            MUST(same.p && same.n == path.n && !memcmp(same.p, path.p, path.n));
        }
    }
    struct access *a = access_decode(p + 2, rules);
    if (!a)
        return;
    static const char *const HOSTS[] = {"a.org", "b.a.org", "c.b.a.org", "127.0.0.1"};
    for (unsigned i = 0; i < 4; i++) {
        struct host h;
        struct access_answer first;
        (void)host_canonical(HOSTS[i], strlen(HOSTS[i]), false, &h);
        struct access_request r = {&h, 443, {"GET", 3}, target, 1};
        struct access_answer answer = access_decide(a, &r);
        enum access_look look = access_look(a, &h, 443, 1, &first);
        /* What is passed through unread would have been allowed whatever the request is. */
        MUST(look != LOOK_PASS || access_observes(a) || (answer.action == ACCESS_ALLOW && !answer.ambiguous));
        (void)access_names_port(a, &h, 443, 1);
    }
    access_free(a);
}

/* A header block as nghttp2 hands it over, field by field: a byte of length before each name and each value. */
static void block(const uint8_t *p, size_t n)
{
    static struct loop l;
    struct fields f = {0}, copy = {0};
    struct destination to = {.port = 443, .tls = true};
    bool good = true;
    if (!l.scratch && !(l.scratch = malloc(SCRATCH)))
        abort();
    fields_start(&l, &f);
    for (size_t at = 0; at + 2 <= n;) {
        size_t a = p[at], b = at + 1 + a < n ? p[at + 1 + a] : 0;
        if (at + 2 + a + b > n)
            break;
        good &= fields_add(&l, &f, p + at + 1, a, p + at + 2 + a, b);
        at += 2 + a + b;
    }
    struct head *h = fields_done(&l, &f);
    if (good) {
        struct pairs pairs;
        const char *text = f.text.p ? f.text.p + f.text.off : "";
        pairs_start(&l, &pairs);
        for (unsigned i = 0; i < h->n; i++) {
            inside(h->f[i].name, text, buf_size(&f.text));
            inside(h->f[i].value, text, buf_size(&f.text));
            MUST(h1_is_token(h->f[i].name.p, h->f[i].name.n) && h1_is_field_value(h->f[i].value.p, h->f[i].value.n));
            pairs_add(&pairs, h->f[i].name, h->f[i].value, false);
        }
        MUST(!pairs.names.over && pairs.n == h->n);
        (void)host_canonical("api.example.com", 15, false, &to.host);
        if (target_of_h2(h, &to) == R_NONE) {
            struct host named;
            uint16_t port;
            MUST(host_parse_authority(h->authority.p, h->authority.n, &named, &port) == HOST_NAME);
            MUST(!strcmp(named.text, to.host.text) && (port == 0 || port == 443) && h->target.n);
        }
        fields_copy(&l, &copy, h);
        fields_free(&l, &copy);
    }
    fields_free(&l, &f);
}

/* What goes on to a guest reads as one request, says once where it comes from, and has no secret. */
static void forward(const char *p, size_t n)
{
    static char out[131072];
    static struct head h;
    char host[HOST_MAX];
    const char *why;
    size_t out_n = sizeof out;
    if (n < 1 || probe_forward(p + 1, n - 1, "192.0.2.7", p[0] & 1, "X-Key", out, &out_n, host, &why) <= 0)
        return;
    MUST(h1_parse_request(out, out_n, &h) == (int)out_n && h.hosts == 1 && *host && strlen(host) < HOST_MAX);
#ifdef WITH_LLHTTP
    agree(false, &h, out, out_n);
#endif
    static const struct {
        const char *name, *value; /* NULL: any */
        unsigned times;
    } WANTED[] = {{"x-forwarded-for", "192.0.2.7", 1},
                  {"x-forwarded-proto", NULL, 1},
                  {"x-forwarded-host", NULL, 1},
                  {"forwarded", NULL, 1},
                  {"x-real-ip", NULL, 0},
                  {"x-key", NULL, 0}};
    for (unsigned k = 0; k < sizeof WANTED / sizeof *WANTED; k++) {
        unsigned times = 0;
        for (unsigned i = 0; i < h.n; i++)
            if (h1_same_variable(h.f[i].name, str_of(WANTED[k].name))) {
                times++;
                MUST(!WANTED[k].value || h1_same(h.f[i].value, str_of(WANTED[k].value)));
            }
        MUST(times == WANTED[k].times);
    }
}

/* Routes as the program writes them, and what is found by them. */
static void sites(const uint8_t *p, size_t n)
{
    static struct sites *table;
    static const char *const HOSTS[] = {"a.b", "a.b.c", "x.example.com", "a"};
    char hostname[HOST_MAX], target[TARGET_MAX];
    if (!table && !(table = probe_sites()))
        abort();
    if (!sites_put(table, "i", p, n))
        return;
    for (unsigned i = 0; i < 4; i++)
        if (probe_find(table, HOSTS[i], 80, hostname, target))
            MUST(*hostname && *target && strlen(target) < TARGET_MAX);
    MUST(sites_drop(table, "i") && !sites_drop(table, "i") && !table->n_shapes);
}

/* Messages of the control protocol for ingresses: the kind and for which of four names, then a payload with two bytes
 * of length. What was confirmed is what is found; in the end nothing is left. */
static void control(const uint8_t *p, size_t n)
{
    static const char *const NAMES[] = {"a.b", "x.example.com", "*.example.com", "a"};
    struct sites *table = probe_sites();
    struct certs certs;
    char shown[4][8] = {{0}}, proof[PROOF_MAX];
    certs_init(&certs);
    while (table && n >= 3) {
        unsigned kind = p[0] % 4, which = p[0] / 4 % 4;
        size_t m = (size_t)(p[1] | p[2] << 8) < n - 3 ? (size_t)(p[1] | p[2] << 8) : n - 3;
        char *text = strndup((const char *)p + 3, m);
        if (!text)
            abort();
        struct host host = {.kind = HOST_NAME, .len = (uint8_t)strlen(NAMES[which])};
        strcpy(host.text, NAMES[which]);
        if (kind == 0 && !sites_put(table, NAMES[which], p + 3, m))
            (void)sites_drop(table, NAMES[which]);
        if (kind == 1) {
            SSL_CTX *ctx = tls_site_context(text, text, m & 1);
            MUST(certs_put(&certs, NAMES[which], ctx));
            SSL *ssl = certs_session(&certs, &host, false);
            MUST(!ctx || ssl);
            SSL_free(ssl);
        }
        if (kind == 2) {
            bool fits = strlen(text) < TOKEN_MAX;
            MUST(certs_challenge(&certs, NAMES[which], text, "proof", NULL) == fits);
            if (fits)
                (void)snprintf(shown[which], sizeof shown[which], "%s", text);
        }
        if (kind == 3) {
            bool found = certs_proof(&certs, &host, text, strlen(text), proof);
            MUST(!found || (*shown[which] && strncmp(text, shown[which], 7) == 0 && strcmp(proof, "proof") == 0));
        }
        free(text);
        p += 3 + m;
        n -= 3 + m;
    }
    for (unsigned i = 0; table && i < 4; i++) {
        (void)sites_drop(table, NAMES[i]);
        MUST(certs_put(&certs, NAMES[i], NULL) && certs_challenge(&certs, NAMES[i], "", "", NULL));
    }
    for (unsigned i = 0; i < CERT_SLOTS; i++)
        MUST(!certs.slots[i]);
    MUST(!table || !table->n_shapes);
    certs_destroy(&certs);
    probe_sites_free(table);
}

/* Texts, each with a byte of length, up to an empty one; then a stream. However it is cut, the result is the same, and
 * is that of a search of the whole. */
static void scrubbing(const uint8_t *p, size_t n)
{
    static char whole[16384 * 4], cut[sizeof whole];
    static const struct str NEW = {"mock-KEY", 8};
    struct needles s = {0};
    size_t at = 0;
    while (at < n && p[at] && at + 1 + p[at] <= n && s.n < 16) {
        needles_add(&s, (struct str){(const char *)p + at + 1, p[at]}, NEW);
        at += 1 + (size_t)p[at];
    }
    const char *in = (const char *)p + at;
    size_t left = n - at, made = 0, step = at % 7 + 1, have = 0, done = 0;
    struct out o = {whole, 0, sizeof whole, false}, pieces = {cut, 0, sizeof cut, false};
    if (left > 4096)
        return;
    while (made < left) {
        unsigned found = 0;
        while (found < s.n
               && (s.needle[found].text.n > left - made
                   || memcmp(in + made, s.needle[found].text.p, s.needle[found].text.n)))
            found++;
        out_add(&o, found < s.n ? NEW.p : in + made, found < s.n ? NEW.n : 1);
        made += found < s.n ? s.needle[found].text.n : 1;
    }
    do {
        struct str piece;
        size_t used;
        have = have + step < left ? have + step : left;
        while ((used = scrub_next(&s, in + done, have - done, have == left, &piece))) {
            MUST(used <= have - done);
            out_add(&pieces, piece.p, piece.n);
            done += used;
        }
    } while (have < left);
    MUST(done == left && !o.over && o.n == pieces.n && !memcmp(whole, cut, o.n));
}

static void within(struct str s, const char *p, size_t n)
{
    MUST(s.n == 0 || (s.p >= p && s.p + s.n <= p + n));
}

/* A client's first message, then messages. What goes on to a server reads as the same login. */
static void postgres(const char *p, size_t n)
{
    static char out[2 * PG_STARTUP_MAX];
    struct pg_startup s, again;
    struct pg_message m;
    enum pg_read got = pg_read_startup(p, n, &s);
    for (size_t cut = 0; got == PG_OK && cut < s.size; cut++)
        MUST(pg_read_startup(p, cut, &again) == PG_MORE);
    if (got == PG_OK)
        MUST(s.size <= n && s.size <= PG_STARTUP_MAX);
    if (got == PG_OK && s.kind == PG_STARTUP) {
        struct out o = {out, 0, sizeof out, false};
        within(s.user, p, s.size);
        within(s.database, p, s.size);
        pg_write_negotiation(&o, &s);
        MUST(!o.over && pg_read_message(out, o.n, sizeof out, &m) == PG_OK && m.size == o.n);
        o.n = 0;
        pg_write_startup(&o, &s);
        MUST(!o.over && pg_read_startup(out, o.n, &again) == (o.n <= PG_STARTUP_MAX ? PG_OK : PG_BAD));
        MUST(o.n > PG_STARTUP_MAX
             || (again.size == o.n && again.version == PG_VERSION_3_0 && again.n == s.n && !again.options
                 && again.user.n == s.user.n && !memcmp(again.user.p, s.user.p, s.user.n)
                 && again.database.n == s.database.n && !memcmp(again.database.p, s.database.p, s.database.n)));
    }
    for (size_t at = got == PG_OK ? s.size : 0; pg_read_message(p + at, n - at, PG_MESSAGE_MAX, &m) == PG_OK;
         at += m.size) {
        struct str a = {"", 0}, b = {"", 0};
        uint32_t x, y;
        within(m.body, p + at, n - at);
        MUST(m.size >= 5 && m.size <= n - at);
        if (pg_read_authentication(m.body, &x, &a))
            within(a, m.body.p, m.body.n);
        (void)pg_offers(m.body, SCRAM);
        if (pg_read_sasl_initial(m.body, &a, &b)) {
            within(a, m.body.p, m.body.n);
            within(b, m.body.p, m.body.n);
        }
        a = pg_error_field(m.body, 'C');
        MUST(a.n == 0 || (a.p > m.body.p && a.p + a.n < m.body.p + m.body.n));
        (void)pg_read_key(m.body, &x, &y);
    }
}

/* The other side's messages, up to a zero byte each. Nobody who does not know the password is trusted. */
static void scram(const char *p, size_t n)
{
    static const struct str PASSWORD = {"pencil", 6};
    static struct scram_client c;
    static struct scram_server s;
    static const struct scram_verifier NOBODY;
    struct scram_binding binding = {.n = 32};
    const char *end = n ? memchr(p, 0, n) : NULL;
    size_t first = end ? (size_t)(end - p) : n;
    struct str one = {p, (uint32_t)first}, two = {end ? end + 1 : p, (uint32_t)(end ? n - first - 1 : 0)};
    memset(&c, 0, sizeof c);
    scram_client_begin(&c, n % 3, &binding, "rOprNGfwEbeRWgbNEkqO");
    if (scram_client_take(&c, one, PASSWORD)) {
        MUST(c.left >= SCRAM_LEAST - 1 && c.left < SCRAM_MOST && c.final.n < SCRAM_TEXT);
        c.left = c.left < 8 ? c.left : 8;
        MUST(!scram_client_derive(&c, 7) && scram_client_derive(&c, 1));
        scram_client_prove(&c);
        MUST(c.final.n < SCRAM_TEXT && !scram_client_trusts(&c, two));
    }
    if (scram_server_begin(&s, &NOBODY, n & 1, &binding, one, "nonce")) {
        MUST(s.first.n < SCRAM_TEXT && s.final.n < SCRAM_TEXT);
        MUST(!scram_server_trusts(&s, &NOBODY, two));
    }
}

static bool same(struct str a, struct str b)
{
    return a.n == b.n && memcmp(a.p, b.p, a.n) == 0;
}

/* Each packet as everything that it can be. What goes on to a guest or a server reads as the same. */
static void mysql(const char *p, size_t n)
{
    static char out[2 * MY_LOGIN_MAX];
    struct my_packet m, again;
    for (size_t at = 0; my_read_packet(p + at, n - at, MY_LOGIN_MAX, &m) == MY_OK; at += m.size) {
        struct my_greeting g, h;
        struct my_login l, k;
        struct str a, b;
        unsigned code;
        within(m.body, p + at, n - at);
        MUST(m.size >= MY_HEADER && m.size <= n - at && m.body.n == m.size - MY_HEADER);
        for (size_t cut = 0; cut < m.size && m.size < 300; cut++)
            MUST(my_read_packet(p + at, cut, MY_LOGIN_MAX, &again) == MY_MORE);
        if (my_read_greeting(m.body, &g)) {
            struct out o = {out, 0, sizeof out, false};
            within(g.version, m.body.p, m.body.n);
            within(g.plugin, m.body.p, m.body.n);
            MUST(g.version.n < MY_VERSION_MAX && g.plugin.n < MY_PLUGIN_MAX);
            my_write_greeting(&o, &g);
            MUST(!o.over && my_read_packet(out, o.n, MY_PACKET_MAX, &again) == MY_OK && again.size == o.n);
            MUST(my_read_greeting(again.body, &h) && same(g.version, h.version) && same(g.plugin, h.plugin)
                 && g.thread == h.thread && g.capabilities == h.capabilities && g.further == h.further
                 && memcmp(g.scramble, h.scramble, MY_SCRAMBLE) == 0);
        }
        if (my_read_login(m.body, &l)) {
            struct out o = {out, 0, sizeof out, false};
            within(l.user, m.body.p, m.body.n);
            within(l.answer, m.body.p, m.body.n);
            within(l.database, m.body.p, m.body.n);
            within(l.plugin, m.body.p, m.body.n);
            within(l.attributes, m.body.p, m.body.n);
            MUST(l.user.n < MY_NAME_MAX && l.plugin.n < MY_PLUGIN_MAX && l.wants_tls == (m.body.n == MY_SSL_REQUEST));
            l.capabilities = (l.capabilities & ~MY_LONG_ANSWER) | MY_SECURE;
            if (l.answer.n > 255)
                l.answer.n = 255;
            if (l.wants_tls)
                l.capabilities |= MY_SSL;
            my_write_login(&o, 1, &l);
            MUST(!o.over && my_read_packet(out, o.n, sizeof out, &again) == MY_OK && again.size == o.n);
            MUST(my_read_login(again.body, &k) && k.wants_tls == l.wants_tls && k.capabilities == l.capabilities
                 && k.further == l.further && same(k.user, l.user) && same(k.answer, l.answer)
                 && same(k.database, l.database) && same(k.plugin, l.plugin) && same(k.attributes, l.attributes));
        }
        if (my_read_switch(m.body, &a, &b)) {
            within(a, m.body.p, m.body.n);
            within(b, m.body.p, m.body.n);
            MUST(a.n && a.n < MY_PLUGIN_MAX && my_kind(m.body) == MY_KIND_SWITCH);
        }
        if (my_read_error(m.body, &code, &a)) {
            within(a, m.body.p, m.body.n);
            MUST((a.n == 0 || a.n == 5) && code <= 0xffff && my_kind(m.body) == MY_KIND_ERROR);
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    if (n < 1)
        return 0;
    const char *p = (const char *)data + 1;
    n--;
    switch (data[0] % 18) {
    case 0:
        head(h1_parse_request, p, n);
        break;
    case 1:
        head(h1_parse_response, p, n);
        break;
    case 2:
        head(h1_parse_trailers, p, n);
        break;
    case 3:
        chunked(p, n);
        break;
    case 4:
        hello((const uint8_t *)p, n);
        break;
    case 5:
        host(p, n);
        break;
    case 6:
        request(p, n);
        break;
    case 7:
        snapshot((const uint8_t *)p, n);
        break;
    case 9:
        signing(p, n);
        break;
    case 10:
        access_rules((const uint8_t *)p, n);
        break;
    case 11:
        forward(p, n);
        break;
    case 13:
        scrubbing((const uint8_t *)p, n);
        break;
    case 12:
        sites((const uint8_t *)p, n);
        break;
    case 14:
        control((const uint8_t *)p, n);
        break;
    case 15:
        postgres(p, n);
        break;
    case 16:
        scram(p, n);
        break;
    case 17:
        mysql(p, n);
        break;
    default:
        block((const uint8_t *)p, n);
        break;
    }
    return 0;
}
