/* See sigv4.h. */
#define _GNU_SOURCE
#include "sigv4.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "query.h"

enum {
    HASH = 32,
    HEX = 64,
    DATE = 8,        /* 20150830 */
    DATE_TIME = 16,  /* 20150830T123600Z */
    MAX_PARTS = 160, /* fields, or parameters, of one request */
    MAX_EXPIRES_S = 7 * 24 * 3600,
};

#define TEXT(literal) ((struct str){literal, sizeof(literal) - 1})

static const char ALGORITHM[] = "AWS4-HMAC-SHA256";
static const char EMPTY_HASH[] = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/* What the guest's signature says. */
struct claim {
    bool presigned;
    struct str key_id, date, region, service, signed_fields;
    struct str expires; /* presigned */
};

struct signing {
    struct out *room, *work;
    struct matched *m;
    const struct head *h;
    const struct destination *to;
    const struct rule *rule;
    struct claim claim;
    struct str when; /* in the room */
    unsigned char key[HASH];
    char signature[HEX];
};

static bool same(struct str a, struct str b)
{
    return a.n == b.n && memcmp(a.p, b.p, a.n) == 0;
}

static bool starts(struct str s, struct str with)
{
    return s.n >= with.n && memcmp(s.p, with.p, with.n) == 0;
}

static void hex(const unsigned char *from, char *to)
{
    for (unsigned i = 0; i < HASH; i++) {
        to[2 * i] = "0123456789abcdef"[from[i] >> 4];
        to[2 * i + 1] = "0123456789abcdef"[from[i] & 15];
    }
}

static void hash_hex(const char *p, size_t n, char out[HEX])
{
    unsigned char hash[HASH];
    if (EVP_Digest(p, n, hash, NULL, EVP_sha256(), NULL) != 1)
        abort();
    hex(hash, out);
}

static void hmac(const void *key, size_t key_n, const char *p, size_t n, unsigned char out[HASH])
{
    unsigned size = HASH;
    if (!HMAC(EVP_sha256(), key, (int)key_n, (const unsigned char *)p, n, out, &size))
        abort();
}

/* ── What the guest signed ────────────────────────────────────────────────────────────────────── */

static struct str cut(struct str *s, char at)
{
    const char *end = memchr(s->p, at, s->n);
    struct str found = {s->p, end ? (uint32_t)(end - s->p) : s->n};
    uint32_t used = found.n + (end != NULL);
    s->p += used;
    s->n -= used;
    return found;
}

static struct str trimmed(struct str s)
{
    while (s.n && s.p[0] == ' ')
        s.p++, s.n--;
    while (s.n && s.p[s.n - 1] == ' ')
        s.n--;
    return s;
}

/* key/date/region/service/aws4_request */
static bool read_scope(struct str s, struct claim *c)
{
    c->key_id = cut(&s, '/');
    c->date = cut(&s, '/');
    c->region = cut(&s, '/');
    c->service = cut(&s, '/');
    return same(s, TEXT("aws4_request"));
}

static bool read_authorization(struct str s, struct claim *c)
{
    bool scope = false, signature = false;
    s.p += sizeof ALGORITHM;
    s.n -= sizeof ALGORITHM;
    while (s.n) {
        struct str item = trimmed(cut(&s, ',')), name = cut(&item, '=');
        if (same(name, TEXT("Credential")) && !scope)
            scope = read_scope(item, c);
        else if (same(name, TEXT("SignedHeaders")) && !c->signed_fields.n)
            c->signed_fields = item;
        else if (same(name, TEXT("Signature")) && !signature)
            signature = item.n == HEX;
        else
            return false;
    }
    return scope && signature && c->signed_fields.n;
}

static struct str find_parameter(struct str path, struct str name)
{
    struct str before, query = query_of(path, &before);
    while (query.n) {
        struct str parameter = next_parameter(&query);
        if (same(parameter_name(parameter), name))
            return parameter_value(parameter);
    }
    return (struct str){NULL, 0};
}

static struct str find_field(const struct head *h, const char *lower)
{
    for (unsigned i = 0; i < h->n; i++)
        if (h1_is(h->f[i].name, lower))
            return h->f[i].value;
    return (struct str){NULL, 0};
}

/* Percent-decoded into the room, which it stays in. */
static struct str decoded(struct out *room, struct str s)
{
    size_t start = room->n;
    int c;
    while ((c = next_decoded(&s)) >= 0) {
        char byte = (char)c;
        out_add(room, &byte, 1);
    }
    return (struct str){room->p + start, (uint32_t)(room->n - start)};
}

static bool read_presigned(struct out *room, struct str path, struct claim *c)
{
    struct str scope = decoded(room, find_parameter(path, TEXT("X-Amz-Credential")));
    c->presigned = true;
    c->signed_fields = decoded(room, find_parameter(path, TEXT("X-Amz-SignedHeaders")));
    c->expires = find_parameter(path, TEXT("X-Amz-Expires"));
    int64_t seconds = c->expires.n ? h1_content_length(c->expires) : -1;
    return same(find_parameter(path, TEXT("X-Amz-Algorithm")), TEXT("AWS4-HMAC-SHA256")) && seconds > 0
        && seconds <= MAX_EXPIRES_S && read_scope(scope, c) && c->signed_fields.n && !room->over;
}

enum signed_by { NOT_SIGNED, BY_FIELD, BY_QUERY, BY_BOTH };

static enum signed_by signed_by(const struct head *h, struct str path)
{
    bool field = false;
    for (unsigned i = 0; i < h->n; i++)
        field |= h->f[i].id == F_AUTHORIZATION;
    bool query = find_parameter(path, TEXT("X-Amz-Algorithm")).p != NULL;
    return field && query ? BY_BOTH : field ? BY_FIELD : query ? BY_QUERY : NOT_SIGNED;
}

static bool is_chunked_and_signed(struct str payload)
{
    return same(payload, TEXT("STREAMING-AWS4-HMAC-SHA256-PAYLOAD"))
        || same(payload, TEXT("STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER"));
}

bool sigv4_needs_body(const struct head *h, struct str path)
{
    enum signed_by how = signed_by(h, path);
    struct str payload = find_field(h, "x-amz-content-sha256");
    if (how == NOT_SIGNED)
        return false;
    if (payload.p)
        return is_chunked_and_signed(payload);
    return h->chunked || h->content_length > 0 || (h->http2 && h->content_length < 0);
}

/* ── The canonical request ────────────────────────────────────────────────────────────────────── */

static bool is_unreserved(int c)
{
    return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '.'
        || c == '_' || c == '~';
}

static void add_encoded(struct out *o, int c, bool keep_slash)
{
    char text[3] = {'%', "0123456789ABCDEF"[c >> 4 & 15], "0123456789ABCDEF"[c & 15]};
    if (is_unreserved(c) || (keep_slash && c == '/'))
        out_add(o, (char[]){(char)c}, 1);
    else
        out_add(o, text, 3);
}

/* S3 takes the key of an object as it is, once encoded; an encoded slash stays one, as SDKs leave it. */
static void add_object_path(struct out *o, struct str path)
{
    while (path.n) {
        bool slash = path.p[0] == '/';
        add_encoded(o, next_decoded(&path), slash);
    }
}

/* All others: the path as sent, without empty and dot segments, encoded again. As AWS's own clients do, "/a/." is "/a",
 * which RFC 3986 would make "/a/". */
static void add_normal_path(struct out *o, struct str path)
{
    size_t start = o->n;
    bool slash = path.n && path.p[path.n - 1] == '/';
    while (path.n) {
        struct str segment = cut(&path, '/');
        if (!segment.n || same(segment, TEXT(".")))
            continue;
        if (same(segment, TEXT(".."))) {
            while (o->n > start && o->p[--o->n] != '/')
                ;
            continue;
        }
        out_add(o, "/", 1);
        for (uint32_t i = 0; i < segment.n; i++)
            add_encoded(o, (unsigned char)segment.p[i], false);
    }
    if (o->n == start || slash)
        out_add(o, "/", 1);
}

struct part {
    struct str name, value;
};

static int compare(struct str a, struct str b)
{
    int r = memcmp(a.p, b.p, a.n < b.n ? a.n : b.n);
    return r ? r : a.n < b.n ? -1 : a.n > b.n;
}

static int compare_parts(const void *one, const void *other)
{
    const struct part *a = one, *b = other;
    int r = compare(a->name, b->name);
    return r ? r : compare(a->value, b->value);
}

/* Decoded and encoded again, so that all spellings give the same text. '+' is a space, as for servers. */
static struct str encoded_again(struct out *room, struct str s)
{
    size_t start = room->n;
    while (s.n) {
        bool plus = s.p[0] == '+';
        int c = next_decoded(&s);
        add_encoded(room, plus ? ' ' : c, false);
    }
    return (struct str){room->p + start, (uint32_t)(room->n - start)};
}

static bool add_query(struct out *o, struct out *room, struct str query)
{
    struct part parts[MAX_PARTS];
    unsigned n = 0;
    while (query.n) {
        struct str parameter = next_parameter(&query);
        if (n == MAX_PARTS)
            return false;
        if (!parameter.n)
            continue;
        parts[n].name = encoded_again(room, parameter_name(parameter));
        parts[n++].value = encoded_again(room, parameter_value(parameter));
    }
    qsort(parts, n, sizeof *parts, compare_parts);
    for (unsigned i = 0; i < n; i++) {
        if (i)
            out_add(o, "&", 1);
        out_add(o, parts[i].name.p, parts[i].name.n);
        out_add(o, "=", 1);
        out_add(o, parts[i].value.p, parts[i].value.n);
    }
    return true;
}

static bool listed(struct str list, struct str name)
{
    while (list.n)
        if (h1_same(cut(&list, ';'), name))
            return true;
    return false;
}

static struct str lowered(struct out *room, struct str s)
{
    size_t start = room->n;
    out_add(room, s.p, s.n);
    for (size_t i = start; i < room->n; i++)
        if (room->p[i] >= 'A' && room->p[i] <= 'Z')
            room->p[i] = (char)(room->p[i] | 0x20);
    return (struct str){room->p + start, (uint32_t)(room->n - start)};
}

/* Fields that the guest signed and that are sent; all fields of AWS, which must be signed; and those that we set. */
static bool is_to_be_signed(const struct signing *s, struct str name)
{
    return listed(s->claim.signed_fields, name) || (name.n > 6 && h1_same((struct str){name.p, 6}, TEXT("x-amz-")));
}

static int by_name(const void *one, const void *other)
{
    const struct part *a = one, *b = other;
    int r = compare(a->name, b->name);
    return r ? r : a->value.p < b->value.p ? -1 : a->value.p > b->value.p; /* repeated fields in their order */
}

static unsigned gather_fields(struct signing *s, struct part *parts, int64_t length)
{
    struct out *room = s->room;
    const struct head *h = s->h;
    unsigned n = 0;
    size_t start = room->n;
    out_authority(room, s->to);
    parts[n++] = (struct part){TEXT("host"), {room->p + start, (uint32_t)(room->n - start)}};
    for (unsigned i = 0; i < h->n; i++) {
        const struct field *f = &h->f[i];
        if (!request_field_passes(h, f, s->m) || f->id == F_HOST || !is_to_be_signed(s, f->name))
            continue;
        parts[n++] = (struct part){lowered(room, f->name), f->value};
    }
    for (unsigned i = 0; i < s->m->fields; i++) {
        const struct set_field *f = &s->m->set[i];
        if (f->value.p && is_to_be_signed(s, f->name) && !h1_is(f->name, "authorization"))
            parts[n++] = (struct part){f->name, f->value};
    }
    if (length >= 0 && listed(s->claim.signed_fields, TEXT("content-length"))) {
        start = room->n;
        out_number(room, (uint64_t)length);
        parts[n++] = (struct part){TEXT("content-length"), {room->p + start, (uint32_t)(room->n - start)}};
    }
    qsort(parts, n, sizeof *parts, by_name);
    return n;
}

static void add_value(struct out *o, struct str value)
{
    value = trimmed(value);
    for (uint32_t i = 0; i < value.n; i++)
        if (value.p[i] != ' ' || value.p[i - 1] != ' ')
            out_add(o, value.p + i, 1);
}

static void add_fields(struct out *o, const struct part *parts, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        bool repeated = i && same(parts[i].name, parts[i - 1].name);
        if (repeated) {
            o->n--; /* the end of the line */
            out_add(o, ",", 1);
        } else {
            out_add(o, parts[i].name.p, parts[i].name.n);
            out_add(o, ":", 1);
        }
        add_value(o, parts[i].value);
        out_add(o, "\n", 1);
    }
}

static struct str names_of(struct out *room, const struct part *parts, unsigned n)
{
    size_t start = room->n;
    for (unsigned i = 0; i < n; i++) {
        if (i && same(parts[i].name, parts[i - 1].name))
            continue;
        if (i)
            out_add(room, ";", 1);
        out_add(room, parts[i].name.p, parts[i].name.n);
    }
    return (struct str){room->p + start, (uint32_t)(room->n - start)};
}

/* ── Signatures ───────────────────────────────────────────────────────────────────────────────── */

static void add_scope(struct out *o, const struct signing *s)
{
    out_add(o, s->when.p, DATE);
    for (unsigned i = SIGV4_REGION; i <= SIGV4_SERVICE; i++) {
        out_add(o, "/", 1);
        out_add(o, s->rule->extra[i].p, s->rule->extra[i].n);
    }
    out_text(o, "/aws4_request");
}

static void derive_key(struct signing *s)
{
    const struct rule *r = s->rule;
    char first[4 + 512];
    unsigned char *key = s->key;
    size_t n = r->value.n < 512 ? r->value.n : 512;
    memcpy(first, "AWS4", 4);
    memcpy(first + 4, r->value.p, n);
    hmac(first, 4 + n, s->when.p, DATE, key);
    OPENSSL_cleanse(first, sizeof first);
    hmac(key, HASH, r->extra[SIGV4_REGION].p, r->extra[SIGV4_REGION].n, key);
    hmac(key, HASH, r->extra[SIGV4_SERVICE].p, r->extra[SIGV4_SERVICE].n, key);
    hmac(key, HASH, "aws4_request", 12, key);
}

/* Signs "algorithm, time, scope, hashes": `rest` is what follows the scope. */
static void sign_text(struct signing *s, const char *algorithm, const char *rest, size_t n)
{
    char text[1024];
    unsigned char signature[HASH];
    struct out o = {text, 0, sizeof text, false};
    out_text(&o, algorithm);
    out_add(&o, "\n", 1);
    out_add(&o, s->when.p, DATE_TIME);
    out_add(&o, "\n", 1);
    add_scope(&o, s);
    out_add(&o, "\n", 1);
    out_add(&o, rest, n);
    hmac(s->key, HASH, o.p, o.n, signature);
    hex(signature, s->signature);
}

/* Signs a chunk or the trailer: the signature before it, then hashes. */
static void sign_next(struct signing *s, const char *algorithm, const char *hashes, size_t n)
{
    char rest[3 * HEX + 2];
    memcpy(rest, s->signature, HEX);
    rest[HEX] = '\n';
    memcpy(rest + HEX + 1, hashes, n);
    sign_text(s, algorithm, rest, HEX + 1 + n);
}

static bool expect(char **p, const char *end, const char *text)
{
    size_t n = strlen(text);
    if ((size_t)(end - *p) < n || memcmp(*p, text, n) != 0)
        return false;
    *p += n;
    return true;
}

static bool chunk_size(char **p, const char *end, size_t *size)
{
    unsigned digits = 0;
    *size = 0;
    for (; *p < end && digits < 8; (*p)++, digits++) {
        char c = **p;
        int v = c >= '0' && c <= '9' ? c - '0'
            : c >= 'a' && c <= 'f'   ? c - 'a' + 10
            : c >= 'A' && c <= 'F'   ? c - 'A' + 10
                                     : -1;
        if (v < 0)
            break;
        *size = *size << 4 | (size_t)v;
    }
    return digits > 0;
}

/* Lines "name:value", then "x-amz-trailer-signature:…" and an empty line; the signature is replaced. */
static bool sign_trailer(struct signing *s, char *p, char *end)
{
    static const char NAME[] = "x-amz-trailer-signature:";
    char hash[HEX];
    struct out *o = s->work;
    o->n = 0;
    for (;;) {
        char *line = p, *stop = memmem(p, (size_t)(end - p), "\r\n", 2);
        if (!stop)
            return false;
        p = stop + 2;
        if (expect(&line, stop, NAME)) {
            hash_hex(o->p, o->n, hash);
            sign_next(s, "AWS4-HMAC-SHA256-TRAILER", hash, HEX);
            if (stop - line != HEX || !expect(&p, end, "\r\n") || p != end || o->over)
                return false;
            memcpy(line, s->signature, HEX);
            return true;
        }
        if (line == stop)
            return false;
        out_add(o, line, (size_t)(stop - line));
        out_add(o, "\n", 1);
    }
}

static bool sign_chunks(struct signing *s, char *p, size_t n, bool trailer)
{
    char *end = p + n;
    char hashes[2 * HEX + 1];
    size_t size;
    memcpy(hashes, EMPTY_HASH, HEX);
    hashes[HEX] = '\n';
    do {
        if (!chunk_size(&p, end, &size) || !expect(&p, end, ";chunk-signature="))
            return false;
        char *signature = p;
        if (end - p < HEX + 2 || (size_t)(end - p) - HEX - 2 < size)
            return false;
        p += HEX;
        if (!expect(&p, end, "\r\n"))
            return false;
        hash_hex(p, size, hashes + HEX + 1);
        sign_next(s, "AWS4-HMAC-SHA256-PAYLOAD", hashes, sizeof hashes);
        memcpy(signature, s->signature, HEX);
        p += size;
        if ((size || !trailer) && !expect(&p, end, "\r\n"))
            return false;
    } while (size);
    return trailer ? sign_trailer(s, p, end) : p == end;
}

/* ── The whole ────────────────────────────────────────────────────────────────────────────────── */

static enum reason refused(struct matched *m, const char *detail)
{
    m->detail = detail;
    return R_SIGNATURE;
}

static bool has_scope(const struct rule *r, const struct claim *c)
{
    return same(r->extra[SIGV4_REGION], c->region) && same(r->extra[SIGV4_SERVICE], c->service);
}

/* The parameters of a presigned URL, with ours; the signature is added behind them. */
static struct str presigned_path(struct signing *s, struct str path, struct str fields)
{
    struct out *room = s->room;
    size_t start = room->n;
    struct str before, query = query_of(path, &before), token = s->rule->extra[SIGV4_TOKEN];
    out_add(room, before.p, before.n);
    out_add(room, "?", 1);
    while (query.n) {
        struct str parameter = next_parameter(&query), name = parameter_name(parameter);
        if (!parameter.n
            || (name.n > 6 && h1_same((struct str){name.p, 6}, TEXT("x-amz-"))
                && (same_decoded(name, TEXT("X-Amz-Algorithm")) || same_decoded(name, TEXT("X-Amz-Credential"))
                    || same_decoded(name, TEXT("X-Amz-Date")) || same_decoded(name, TEXT("X-Amz-Expires"))
                    || same_decoded(name, TEXT("X-Amz-SignedHeaders")) || same_decoded(name, TEXT("X-Amz-Signature"))
                    || same_decoded(name, TEXT("X-Amz-Security-Token")))))
            continue;
        out_add(room, parameter.p, parameter.n);
        out_add(room, "&", 1);
    }
    out_text(room, "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=");
    struct str id = s->rule->extra[SIGV4_KEY_ID];
    for (uint32_t i = 0; i < id.n; i++)
        add_encoded(room, (unsigned char)id.p[i], false);
    out_text(room, "%2F");
    char scope[512];
    struct out o = {scope, 0, sizeof scope, false};
    add_scope(&o, s);
    for (size_t i = 0; i < o.n; i++)
        add_encoded(room, (unsigned char)o.p[i], false);
    out_text(room, "&X-Amz-Date=");
    out_add(room, s->when.p, DATE_TIME);
    out_text(room, "&X-Amz-Expires=");
    out_add(room, s->claim.expires.p, s->claim.expires.n);
    out_text(room, "&X-Amz-SignedHeaders=");
    for (uint32_t i = 0; i < fields.n; i++)
        add_encoded(room, (unsigned char)fields.p[i], false);
    if (token.n) {
        out_text(room, "&X-Amz-Security-Token=");
        for (uint32_t i = 0; i < token.n; i++)
            add_encoded(room, (unsigned char)token.p[i], false);
    }
    return (struct str){room->p + start, (uint32_t)(room->n - start)};
}

static void set_authorization(struct signing *s, struct str fields)
{
    struct out *room = s->room;
    size_t start = room->n;
    out_text(room, "AWS4-HMAC-SHA256 Credential=");
    out_add(room, s->rule->extra[SIGV4_KEY_ID].p, s->rule->extra[SIGV4_KEY_ID].n);
    out_add(room, "/", 1);
    add_scope(room, s);
    out_text(room, ", SignedHeaders=");
    out_add(room, fields.p, fields.n);
    out_text(room, ", Signature=");
    out_add(room, s->signature, HEX);
    set_field(s->m, TEXT("authorization"), (struct str){room->p + start, (uint32_t)(room->n - start)});
}

/* The payload's hash: as the guest gave it, or computed into `hash`. */
static bool read_payload(const struct signing *s, const char *body, size_t n, char hash[HEX], struct str *payload)
{
    struct str given = find_field(s->h, "x-amz-content-sha256");
    bool object = h1_is(s->rule->extra[SIGV4_SERVICE], "s3");
    *payload = given;
    if (given.p)
        return is_chunked_and_signed(given) || given.n == HEX || same(given, TEXT("UNSIGNED-PAYLOAD"))
            || same(given, TEXT("STREAMING-UNSIGNED-PAYLOAD-TRAILER"));
    if (s->claim.presigned && object) {
        *payload = TEXT("UNSIGNED-PAYLOAD");
    } else {
        hash_hex(body ? body : "", body ? n : 0, hash);
        *payload = (struct str){hash, HEX};
    }
    return true;
}

/* Signs the canonical request; the signature is then in s->signature. */
static enum reason sign_request(struct signing *s, struct str path, const struct part *parts, unsigned count,
                                struct str fields, struct str payload)
{
    struct out *o = s->work, *room = s->room;
    struct str before, query = query_of(path, &before);
    size_t kept = room->n;
    char hash[HEX];
    o->n = 0;
    out_add(o, s->h->method.p, s->h->method.n);
    out_add(o, "\n", 1);
    if (h1_is(s->rule->extra[SIGV4_SERVICE], "s3"))
        add_object_path(o, before.n ? before : TEXT("/"));
    else
        add_normal_path(o, before);
    out_add(o, "\n", 1);
    bool fits = add_query(o, room, query);
    out_add(o, "\n", 1);
    add_fields(o, parts, count);
    out_add(o, "\n", 1);
    out_add(o, fields.p, fields.n);
    out_add(o, "\n", 1);
    out_add(o, payload.p, payload.n);
    if (!fits || o->over || room->over)
        return R_HEAD_TOO_LARGE;
    room->n = kept;
    hash_hex(o->p, o->n, hash);
    sign_text(s, ALGORITHM, hash, HEX);
    return R_NONE;
}

static enum reason sign(struct signing *s, struct str path, char *body, size_t n)
{
    struct out *room = s->room;
    struct matched *m = s->m;
    struct part parts[H1_MAX_FIELDS + MAX_SET + 2];
    struct str payload, none = {NULL, 0}, token = s->rule->extra[SIGV4_TOKEN];
    bool presigned = s->claim.presigned;
    char hash[HEX];
    if (!read_payload(s, body, n, hash, &payload))
        return refused(m, "x-amz-content-sha256 is of an unknown kind");
    derive_key(s);
    set_field(m, TEXT("x-amz-date"), presigned ? none : s->when);
    set_field(m, TEXT("x-amz-security-token"), presigned || !token.n ? none : token);
    unsigned count = gather_fields(s, parts, body ? (int64_t)n : s->h->content_length);
    struct str fields = names_of(room, parts, count);
    if (presigned)
        path = presigned_path(s, path, fields); /* the last in the room, so that the signature can follow it */
    enum reason why = sign_request(s, path, parts, count, fields, payload);
    if (why != R_NONE)
        return why;
    if (presigned) {
        out_text(room, "&X-Amz-Signature=");
        out_add(room, s->signature, HEX);
        m->path = (struct str){path.p, (uint32_t)(room->p + room->n - path.p)};
    } else {
        set_authorization(s, fields);
    }
    bool trailer = payload.n > sizeof "STREAMING-AWS4-HMAC-SHA256-PAYLOAD";
    if (is_chunked_and_signed(payload) && !(body && sign_chunks(s, body, n, trailer)))
        return refused(m, "the chunks of the body are not signed as aws-chunked");
    return room->over ? R_HEAD_TOO_LARGE : R_NONE;
}

enum reason sigv4_sign(struct out *room, struct out *work, struct matched *m, const struct head *h,
                       const struct destination *to, struct str path, char *body, size_t n, int64_t now_s)
{
    struct signing s = {.room = room, .work = work, .m = m, .h = h, .to = to};
    enum signed_by how = signed_by(h, path);
    struct str given = find_field(h, "authorization");
    bool known = false;
    if (how == NOT_SIGNED)
        return R_NONE;
    if (how == BY_BOTH)
        return refused(m, "it is signed twice");
    if (how == BY_FIELD ? !starts(given, TEXT("AWS4-HMAC-SHA256 ")) || !read_authorization(given, &s.claim)
                        : !read_presigned(room, path, &s.claim))
        return refused(m, "it is not an AWS4-HMAC-SHA256 signature of the usual form");
    for (unsigned i = 0; i < m->n && !s.rule; i++) {
        const struct rule *r = m->rules[i];
        if (r->kind != RULE_SIGV4 || !same(r->placeholder, s.claim.key_id))
            continue;
        known = true;
        if (has_scope(r, &s.claim))
            s.rule = r;
    }
    if (!s.rule)
        return refused(m,
                       known ? "the credential is not for this region and service"
                             : "its access key is not the placeholder of a credential for this host");
    struct tm t;
    time_t now = (time_t)now_s;
    char when[DATE_TIME + 1];
    if (!gmtime_r(&now, &t) || strftime(when, sizeof when, "%Y%m%dT%H%M%SZ", &t) != DATE_TIME)
        return refused(m, "the host's clock is wrong");
    s.when = (struct str){room->p + room->n, DATE_TIME};
    out_add(room, when, DATE_TIME);
    if (room->over)
        return R_HEAD_TOO_LARGE;
    enum reason why = sign(&s, path, body, n);
    OPENSSL_cleanse(s.key, sizeof s.key);
    return why;
}
