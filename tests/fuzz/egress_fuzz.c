/* Fuzz target for everything of the egress path that reads bytes of guests or hosts: heads, trailers, chunks, the
 * ClientHello, hosts and authorities. The first byte of the input picks the parser.
 *
 *   clang -g -O1 -fsanitize=fuzzer,address,undefined -Iext/egress tests/fuzz/egress_fuzz.c \
 *         ext/egress/{h1,hello,host,addr}.c -o build/fuzz-egress
 *   build/fuzz-egress -max_len=40000 tests/fuzz/egress
 *
 * Held to more than not crashing: what is parsed lies inside the input; a message read whole is the same message when it
 * comes in two pieces; an accepted value contains nothing that could end a line.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "addr.h"
#include "h1.h"
#include "hello.h"
#include "host.h"

#define MUST(x) \
    do { \
        if (!(x)) \
            abort(); \
    } while (0)

static void inside(struct str s, const char *p, size_t n)
{
    MUST(s.n == 0 || (s.p >= p && s.p + s.n <= p + n));
    for (uint32_t i = 0; i < s.n; i++)
        MUST(s.p[i] != '\r' && s.p[i] != '\n' && s.p[i] != 0);
}

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

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    if (n < 1)
        return 0;
    const char *p = (const char *)data + 1;
    n--;
    switch (data[0] % 6) {
    case 0: head(h1_parse_request, p, n); break;
    case 1: head(h1_parse_response, p, n); break;
    case 2: head(h1_parse_trailers, p, n); break;
    case 3: chunked(p, n); break;
    case 4: hello((const uint8_t *)p, n); break;
    default: host(p, n); break;
    }
    return 0;
}
