/* See transform.h. */
#define _GNU_SOURCE
#include "transform.h"

#include "query.h"
#include "sigv4.h"

#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

static bool sets_parameter(const struct matched *m, struct str name)
{
    for (unsigned i = 0; i < m->n; i++)
        if (m->rules[i]->kind == RULE_QUERY && same_decoded(m->rules[i]->name, name))
            return true;
    return false;
}

/* The path with the guest's parameters of those names taken out and ours added. */
static void set_parameters(struct out *room, struct matched *m, struct str path)
{
    size_t start = room->n;
    struct str before, query = query_of(path, &before);
    const char *separator = "?";
    if (!before.n)
        out_add(room, "/", 1);
    out_add(room, before.p, before.n);
    while (query.n) {
        struct str parameter = next_parameter(&query);
        if (sets_parameter(m, parameter_name(parameter)))
            continue;
        out_add(room, separator, 1);
        out_add(room, parameter.p, parameter.n);
        separator = "&";
    }
    for (unsigned i = 0; i < m->n; i++) {
        const struct rule *r = m->rules[i];
        if (r->kind != RULE_QUERY)
            continue;
        out_add(room, separator, 1);
        out_add(room, r->name.p, r->name.n);
        out_add(room, "=", 1);
        out_add(room, r->value.p, r->value.n);
        separator = "&";
    }
    m->path = (struct str){room->p + start, (uint32_t)(room->n - start)};
}

static bool has_kind(const struct matched *m, enum rule_kind kind)
{
    for (unsigned i = 0; i < m->n; i++)
        if (m->rules[i]->kind == kind)
            return true;
    return false;
}

static enum content kind_of(struct str type)
{
    const char *end = memchr(type.p, ';', type.n);
    if (end)
        type.n = (uint32_t)(end - type.p);
    while (type.n && (type.p[type.n - 1] == ' ' || type.p[type.n - 1] == '\t'))
        type.n--;
    bool json = h1_is(type, "application/json")
        || (type.n > 5 && h1_same((struct str){type.p + type.n - 5, 5}, (struct str){"+json", 5}));
    return json ? CONTENT_JSON : h1_is(type, "application/x-www-form-urlencoded") ? CONTENT_FORM : CONTENT_OTHER;
}

enum content content_of(const struct head *h)
{
    enum content found = CONTENT_OTHER;
    for (unsigned i = 0; i < h->n; i++) {
        if (h1_is(h->f[i].name, "content-encoding"))
            return CONTENT_OTHER;
        if (h1_is(h->f[i].name, "content-type"))
            found = kind_of(h->f[i].value);
    }
    return found;
}

bool transform_needs_body(const struct matched *m, const struct head *h, struct str path)
{
    if (!h->chunked && h->content_length <= 0 && !(h->http2 && h->content_length < 0))
        return false;
    return has_kind(m, RULE_HMAC) || (has_kind(m, RULE_BODY) && content_of(h) != CONTENT_OTHER)
        || (has_kind(m, RULE_SIGV4) && sigv4_needs_body(h, path));
}

/* "prefix HMAC-SHA256(before, body)", in hexadecimal, as the field's value. */
static void set_hmac(struct out *room, struct matched *m, const struct rule *r, struct str name, const char *prefix,
                     struct str before, struct body_text body)
{
    unsigned char sum[32];
    size_t n = sizeof sum, start = room->n;
    EVP_PKEY *key = EVP_PKEY_new_raw_private_key(EVP_PKEY_HMAC, NULL, (const unsigned char *)r->value.p, r->value.n);
    EVP_MD_CTX *context = EVP_MD_CTX_new();
    bool good = key && context && EVP_DigestSignInit(context, NULL, EVP_sha256(), NULL, key) == 1
        && EVP_DigestSignUpdate(context, before.p, before.n) == 1
        && (!body.n || EVP_DigestSignUpdate(context, body.p, body.n) == 1) && EVP_DigestSignFinal(context, sum, &n) == 1
        && n == sizeof sum;
    EVP_MD_CTX_free(context);
    EVP_PKEY_free(key);
    if (!good)
        abort(); /* nothing sensible is left to do without memory */
    out_text(room, prefix);
    for (unsigned i = 0; i < sizeof sum; i++)
        out_add(room, (char[]){"0123456789abcdef"[sum[i] >> 4], "0123456789abcdef"[sum[i] & 15]}, 2);
    set_field(m, name, (struct str){room->p + start, (uint32_t)(room->n - start)});
}

static struct str added(struct out *room, const char *before, int64_t number, const char *after)
{
    size_t start = room->n;
    out_text(room, before);
    out_number(room, (uint64_t)number);
    out_text(room, after);
    return (struct str){room->p + start, (uint32_t)(room->n - start)};
}

static void sign_body(struct out *room, struct matched *m, const struct rule *r, struct body_text body, int64_t now_s)
{
    struct str scheme = r->extra[0], none = {"", 0};
    if (h1_is(scheme, "github")) {
        set_hmac(room, m, r, r->name, "sha256=", none, body);
    } else if (h1_is(scheme, "stripe")) {
        char prefix[64];
        struct out o = {prefix, 0, sizeof prefix - 1, false};
        out_text(&o, "t=");
        out_number(&o, (uint64_t)now_s);
        out_text(&o, ",v1=");
        prefix[o.n] = 0;
        set_hmac(room, m, r, r->name, prefix, added(room, "", now_s, "."), body);
    } else {
        set_field(m, (struct str){"x-slack-request-timestamp", 25}, added(room, "", now_s, ""));
        set_hmac(room, m, r, r->name, "v0=", added(room, "v0:", now_s, ":"), body);
    }
}

enum reason transform(struct out *room, struct out *work, struct matched *m, const struct head *h,
                      const struct destination *to, struct str path, struct body_text body, int64_t now_s)
{
    enum reason why = R_NONE;
    if (body.p && h->expect_continue)
        set_field(m, (struct str){"expect", 6}, (struct str){NULL, 0}); /* it was answered already */
    if (has_kind(m, RULE_QUERY))
        set_parameters(room, m, path);
    if (m->path.n)
        path = m->path;
    for (unsigned i = 0; i < m->n; i++)
        if (m->rules[i]->kind == RULE_HMAC)
            sign_body(room, m, m->rules[i], body, now_s);
    if (has_kind(m, RULE_SIGV4))
        why = sigv4_sign(room, work, m, h, to, path, body.p, body.n, now_s);
    return why == R_NONE && room->over ? R_HEAD_TOO_LARGE : why;
}
