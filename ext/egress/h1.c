/* See h1.h. Restarts from the first byte on every call: heads nearly always arrive whole, and a head sent byte by byte
 * costs less than its packets do (16 µs at the limit of 32 KB). */
#include "h1.h"

#include <string.h>

enum { TOKEN = 1, VALUE = 2, TARGET = 4, HEX = 8 };

/* Classes of bytes: token characters; what a field value may hold (HTAB, SP, visible, obs-text); what a request
 * target may hold (visible ASCII without '#': a fragment never travels); hexadecimal digits. */
static const uint8_t CLASS[256] = {
    ['\t'] = VALUE,
    [' '] = VALUE,
    [0x80 ... 0xff] = VALUE,
    ['"'] = VALUE | TARGET,
    ['(' ... ')'] = VALUE | TARGET,
    [','] = VALUE | TARGET,
    ['/'] = VALUE | TARGET,
    [':' ... '@'] = VALUE | TARGET,
    ['[' ... ']'] = VALUE | TARGET,
    ['{'] = VALUE | TARGET,
    ['}'] = VALUE | TARGET,
    ['#'] = TOKEN | VALUE,
    ['!'] = TOKEN | VALUE | TARGET,
    ['$' ... '\''] = TOKEN | VALUE | TARGET,
    ['*' ... '+'] = TOKEN | VALUE | TARGET,
    ['-' ... '.'] = TOKEN | VALUE | TARGET,
    ['^' ... '`'] = TOKEN | VALUE | TARGET,
    ['|'] = TOKEN | VALUE | TARGET,
    ['~'] = TOKEN | VALUE | TARGET,
    ['G' ... 'Z'] = TOKEN | VALUE | TARGET,
    ['g' ... 'z'] = TOKEN | VALUE | TARGET,
    ['0' ... '9'] = TOKEN | VALUE | TARGET | HEX,
    ['A' ... 'F'] = TOKEN | VALUE | TARGET | HEX,
    ['a' ... 'f'] = TOKEN | VALUE | TARGET | HEX,
};

static inline bool is(char c, uint8_t k)
{
    return CLASS[(unsigned char)c] & k;
}

static inline char lower(char c)
{
    return c >= 'A' && c <= 'Z' ? (char)(c | 0x20) : c;
}

bool h1_same(struct str a, struct str b)
{
    if (a.n != b.n)
        return false;
    for (uint32_t i = 0; i < a.n; i++)
        if (lower(a.p[i]) != lower(b.p[i]))
            return false;
    return true;
}

bool h1_same_variable(struct str a, struct str b)
{
    if (a.n != b.n)
        return false;
    for (uint32_t i = 0; i < a.n; i++)
        if ((a.p[i] == '_' ? '-' : lower(a.p[i])) != (b.p[i] == '_' ? '-' : lower(b.p[i])))
            return false;
    return true;
}

bool h1_is(struct str a, const char *text)
{
    return h1_same(a, (struct str){text, (uint32_t)strlen(text)});
}

bool h1_is_token(const char *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!is(p[i], TOKEN))
            return false;
    return n > 0;
}

bool h1_is_field_value(const char *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!is(p[i], VALUE))
            return false;
    return true;
}

bool h1_is_target(const char *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!is(p[i], TARGET))
            return false;
    return n > 0;
}

static struct str trim(struct str s)
{
    while (s.n && (s.p[0] == ' ' || s.p[0] == '\t'))
        s.p++, s.n--;
    while (s.n && (s.p[s.n - 1] == ' ' || s.p[s.n - 1] == '\t'))
        s.n--;
    return s;
}

/* Cuts the next item off a comma-separated list; false at its end. */
static bool next_item(struct str *list, struct str *item)
{
    if (!list->p)
        return false;
    const char *comma = memchr(list->p, ',', list->n);
    uint32_t n = comma ? (uint32_t)(comma - list->p) : list->n;
    *item = trim((struct str){list->p, n});
    *list = comma ? (struct str){comma + 1, list->n - n - 1} : (struct str){NULL, 0};
    return true;
}

bool h1_list_has(struct str list, struct str wanted)
{
    struct str item;
    while (next_item(&list, &item))
        if (h1_same(item, wanted))
            return true;
    return false;
}

int64_t h1_content_length(struct str v)
{
    int64_t total = 0;
    if (v.n == 0 || v.n > 18)
        return -1;
    for (uint32_t i = 0; i < v.n; i++) {
        if (v.p[i] < '0' || v.p[i] > '9')
            return -1;
        total = total * 10 + (v.p[i] - '0');
    }
    return total;
}

enum h1_field_id h1_field_id(const char *p, size_t n)
{
#define MATCH(text, id)                            \
    if (h1_is((struct str){p, (uint32_t)n}, text)) \
    return id
    switch (n) {
    case 2:
        MATCH("te", F_TE);
        break;
    case 4:
        MATCH("host", F_HOST);
        break;
    case 6:
        MATCH("cookie", F_COOKIE);
        MATCH("expect", F_EXPECT);
        break;
    case 7:
        MATCH("upgrade", F_UPGRADE);
        MATCH("trailer", F_TRAILER);
        MATCH("alt-svc", F_ALT_SVC);
        break;
    case 10:
        MATCH("connection", F_CONNECTION);
        MATCH("keep-alive", F_KEEP_ALIVE);
        break;
    case 12:
        MATCH("max-forwards", F_MAX_FORWARDS);
        break;
    case 13:
        MATCH("authorization", F_AUTHORIZATION);
        break;
    case 14:
        MATCH("content-length", F_CONTENT_LENGTH);
        MATCH("http2-settings", F_HTTP2_SETTINGS);
        break;
    case 16:
        MATCH("proxy-connection", F_PROXY_CONNECTION);
        MATCH("x-hypeman-egress", F_HYPEMAN);
        break;
    case 17:
        MATCH("transfer-encoding", F_TRANSFER_ENCODING);
        break;
    case 18:
        MATCH("proxy-authenticate", F_PROXY_AUTHENTICATE);
        break;
    case 19:
        MATCH("proxy-authorization", F_PROXY_AUTHORIZATION);
        break;
    default:
        break;
    }
#undef MATCH
    return F_OTHER;
}

static void reset(struct head *h)
{
    memset(h, 0, offsetof(struct head, f));
    h->content_length = -1;
}

/* Takes note of what a field says about framing and connection. False: the message must be refused. */
static bool note_field(struct head *h, const struct field *f)
{
    struct str list = f->value, item;
    switch (f->id) {
    case F_HOST:
        h->authority = f->value;
        return ++h->hosts == 1;
    case F_CONTENT_LENGTH:
        if (h->content_length >= 0)
            return false;
        h->content_length = h1_content_length(f->value);
        return h->content_length >= 0;
    case F_TRANSFER_ENCODING:
        if (h->chunked || !h1_is(f->value, "chunked"))
            return false;
        h->chunked = true;
        return true;
    case F_CONNECTION:
        while (next_item(&list, &item)) {
            if (item.n && !h1_is_token(item.p, item.n))
                return false;
            h->connection_close |= h1_is(item, "close");
            h->connection_keep_alive |= h1_is(item, "keep-alive");
            h->connection_upgrade |= h1_is(item, "upgrade");
        }
        return true;
    case F_TE:
        h->te_trailers |= h1_list_has(f->value, (struct str){"trailers", 8});
        return true;
    case F_EXPECT:
        if (h1_is(f->value, "100-continue"))
            h->expect_continue = true;
        else
            h->expect_other = true;
        return true;
    default:
        return true;
    }
}

/* Field lines from in[at..n) up to the empty line; the common tail of all three parsers. */
static int parse_fields(const char *in, size_t n, size_t at, size_t limit, struct head *h)
{
    const char *p = in + at, *end = in + n;
    for (;;) {
        if ((size_t)(p - in) > limit)
            return H1_TOO_LARGE;
        if (p == end)
            return n >= limit ? H1_TOO_LARGE : 0;
        if (*p == '\r') {
            if (p + 1 == end)
                return 0;
            if (p[1] != '\n')
                return H1_BAD;
            return (int)(p + 2 - in);
        }
        const char *name = p;
        while (p < end && is(*p, TOKEN))
            p++;
        if (p == end)
            return n >= limit ? H1_TOO_LARGE : 0;
        if (p == name || *p != ':')
            return H1_BAD;
        const char *colon = p++;
        while (p < end && is(*p, VALUE))
            p++;
        if (p == end)
            return n >= limit ? H1_TOO_LARGE : 0;
        if (*p != '\r')
            return H1_BAD;
        if (p + 1 == end)
            return 0;
        if (p[1] != '\n')
            return H1_BAD;
        if (h->n == H1_MAX_FIELDS)
            return H1_TOO_LARGE;
        struct field *f = &h->f[h->n++];
        f->name = (struct str){name, (uint32_t)(colon - name)};
        f->value = trim((struct str){colon + 1, (uint32_t)(p - colon - 1)});
        f->id = h1_field_id(f->name.p, f->name.n);
        if (!note_field(h, f))
            return H1_BAD;
        p += 2;
    }
}

/* "HTTP/1.0" or "HTTP/1.1" at p: the minor version; -1 if it is neither; -2 if more input is needed. */
static int parse_version(const char *p, const char *end)
{
    static const char text[] = "HTTP/1.";
    for (unsigned i = 0; i < 7; i++) {
        if (p + i == end)
            return -2;
        if (p[i] != text[i])
            return -1;
    }
    if (p + 7 == end)
        return -2;
    return p[7] == '0' ? 0 : p[7] == '1' ? 1 : -1;
}

/* What follows the first line, whose end is at p. */
static int parse_rest(const char *in, size_t n, const char *p, struct head *h)
{
    if (*p != '\r')
        return H1_BAD;
    if (p + 1 == in + n)
        return 0;
    if (p[1] != '\n')
        return H1_BAD;
    int used = parse_fields(in, n, (size_t)(p + 2 - in), H1_MAX_HEAD, h);
    if (used > 0 && h->chunked && (h->content_length >= 0 || h->minor == 0))
        return H1_BAD;
    return used;
}

int h1_parse_request(const char *in, size_t n, struct head *h)
{
    const char *p = in, *end = in + n;
    reset(h);
    while (p < end && is(*p, TOKEN))
        p++;
    if (p - in > 32)
        return H1_BAD;
    if (p == end)
        return 0;
    if (p == in || *p != ' ')
        return H1_BAD;
    h->method = (struct str){in, (uint32_t)(p - in)};
    const char *target = ++p;
    while (p < end && is(*p, TARGET))
        p++;
    if (p - in > H1_MAX_HEAD)
        return H1_TOO_LARGE;
    if (p == end)
        return n >= H1_MAX_HEAD ? H1_TOO_LARGE : 0;
    if (p == target || *p != ' ')
        return H1_BAD;
    h->target = (struct str){target, (uint32_t)(p - target)};
    p++;
    h->minor = parse_version(p, end);
    if (h->minor < 0)
        return h->minor == -2 ? 0 : H1_BAD;
    p += 8;
    if (p == end)
        return 0;
    int used = parse_rest(in, n, p, h);
    if (used > 0 && h->minor == 1 && h->hosts == 0)
        return H1_BAD;
    return used;
}

int h1_parse_response(const char *in, size_t n, struct head *h)
{
    const char *p = in, *end = in + n;
    reset(h);
    h->minor = parse_version(p, end);
    if (h->minor < 0)
        return h->minor == -2 ? 0 : H1_BAD;
    p += 8;
    for (int i = 0; i < 4; i++, p++) {
        if (p == end)
            return 0;
        if (i == 0 ? *p != ' ' : (*p < '0' || *p > '9'))
            return H1_BAD;
        if (i > 0)
            h->status = h->status * 10 + (*p - '0');
    }
    if (h->status < 100) /* 600 to 999 mean nothing, and are read as a 5xx (RFC 9110 15) */
        return H1_BAD;
    if (p == end)
        return 0;
    if (*p == ' ') {
        const char *reason = ++p;
        while (p < end && is(*p, VALUE))
            p++;
        h->reason = (struct str){reason, (uint32_t)(p - reason)};
        if (p == end)
            return n >= H1_MAX_HEAD ? H1_TOO_LARGE : 0;
    }
    return parse_rest(in, n, p, h);
}

int h1_parse_trailers(const char *in, size_t n, struct head *h)
{
    reset(h);
    int used = parse_fields(in, n, 0, H1_MAX_TRAILERS, h);
    if (used <= 0)
        return used;
    if (h->chunked || h->content_length >= 0 || h->hosts)
        return H1_BAD;
    return used;
}

enum chunk_state { SIZE, EXTENSION, SIZE_LF, DATA, DATA_CR, DATA_LF };

enum { MAX_EXTENSION = 4096 };

static int hex(char c)
{
    return c <= '9' ? c - '0' : lower(c) - 'a' + 10;
}

enum h1_chunk_event h1_chunked_next(struct h1_chunked *d, const char *in, size_t n, size_t *used, struct str *data)
{
    size_t i = 0;
    while (i < n) {
        char c = in[i];
        switch ((enum chunk_state)d->state) {
        case SIZE:
            if (is(c, HEX)) {
                if (++d->digits > 15) /* below 2^60: no sum of ours overflows */
                    return H1_CHUNK_BAD;
                d->left = d->left * 16 + (uint64_t)hex(c);
                i++;
            } else if (d->digits && (c == ';' || c == '\r')) {
                d->state = c == ';' ? EXTENSION : SIZE_LF;
                i++;
            } else {
                return H1_CHUNK_BAD;
            }
            break;
        case EXTENSION:
            if (++d->extension > MAX_EXTENSION || (c != '\r' && !is(c, VALUE)))
                return H1_CHUNK_BAD;
            if (c == '\r')
                d->state = SIZE_LF;
            i++;
            break;
        case SIZE_LF:
            if (c != '\n')
                return H1_CHUNK_BAD;
            i++;
            d->digits = 0;
            d->state = d->left ? DATA : SIZE;
            if (!d->left) {
                *used = i;
                return H1_CHUNK_TRAILERS;
            }
            break;
        case DATA: {
            size_t run = n - i < d->left ? n - i : (size_t)d->left;
            *data = (struct str){in + i, (uint32_t)run};
            *used = i + run;
            d->left -= run;
            if (!d->left)
                d->state = DATA_CR;
            return H1_CHUNK_DATA;
        }
        case DATA_CR:
            if (c != '\r')
                return H1_CHUNK_BAD;
            d->state = DATA_LF;
            i++;
            break;
        case DATA_LF:
            if (c != '\n')
                return H1_CHUNK_BAD;
            d->state = SIZE;
            i++;
            break;
        }
    }
    *used = i;
    return H1_CHUNK_MORE;
}
