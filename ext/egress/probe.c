/* What happens to one request head, without a connection: the same functions that down1.c and up1.c call, in their
 * order. For tests, which compare it with the readable twin hypeman/_native/egress_head_py.py. */
#include "probe.h"

#include <openssl/crypto.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "forward.h"
#include "transform.h"

/* As h1_parse_request; *reason: why it is refused. */
static int parse(const char *in, size_t n, struct head *h, const char **reason)
{
    int used = h1_parse_request(in, n, h);
    if (used < 0)
        *reason = REASONS[used == H1_TOO_LARGE ? R_HEAD_TOO_LARGE : R_BAD_REQUEST].code;
    return used < 0 ? -1 : used;
}

static struct request_line line_of(const struct head *h, struct str path)
{
    enum body body = h->chunked ? BODY_CHUNKED : h->content_length >= 0 ? BODY_LENGTH : BODY_NONE;
    return (struct request_line){path, body, h->content_length > 0 ? (uint64_t)h->content_length : 0, may_upgrade(h)};
}

int probe_head(const char *in, size_t n, const uint8_t *rules, size_t rules_n, const struct probe_origin *from,
               char *body, size_t body_n, int64_t now_s, char *out, size_t *out_n, const char **reason)
{
    static __thread struct head h;
    static __thread char text[TRANSFORM_ROOM];
    struct out room = {text, 0, sizeof text, false}, work = {out, 0, *out_n, false};
    struct destination bound = {.port = from->port, .tls = true}, to;
    struct str path;
    struct matched m = {0};
    struct ruled ruled;
    enum reason why = R_NONE;
    *reason = REASONS[R_BAD_REQUEST].code;
    if (from->tls_name && host_canonical(from->tls_name, strlen(from->tls_name), false, &bound.host) == HOST_INVALID)
        return -1;
    int used = parse(in, n, &h, reason);
    if (used <= 0)
        return used;
    struct origin origin = {from->tls_name ? &bound : NULL, from->explicit_proxy, from->port};
    struct snapshot *s = snapshot_decode(rules, rules_n);
    if (!s)
        return -1;
    why = target_of_h1(&h, &origin, &to, &path);
    if (why == R_NONE && h.expect_other)
        why = R_EXPECTATION;
    if (why == R_NONE)
        why = check_hops(&h);
    if (why == R_NONE)
        why = decide_request(s, &h, &to, path, now_s, NULL, &ruled, &m);
    if (why == R_NONE && m.unready)
        why = R_CREDENTIAL;
    if (why == R_NONE && m.transforms)
        why = transform(&room, &work, &m, &h, &to, path, (struct body_text){body_n ? body : NULL, body_n}, now_s);
    if (why == R_NONE) {
        struct request_line line = line_of(&h, path);
        struct out o = {out, 0, *out_n, false};
        render_request(&o, &h, &line, &to, &m);
        *out_n = o.n;
        if (o.over)
            why = R_HEAD_TOO_LARGE;
    }
    OPENSSL_cleanse(text, room.n);
    snapshot_release(s);
    *reason = why == R_SIGNATURE && m.detail ? m.detail : REASONS[why].code;
    return why == R_NONE ? used : -1;
}

const char *probe_access(const uint8_t *rules, size_t rules_n, const char *host, uint16_t port, const char *method,
                         const char *target, bool override, int64_t now_s, char rule[64])
{
    static __thread struct head h;
    static const char NAME[] = "X-HTTP-Method-Override";
    struct destination to = {.port = port, .tls = true};
    struct snapshot s = {0};
    struct ruled ruled;
    enum reason why;
    if (host_canonical(host, strlen(host), strchr(host, ':') != NULL, &to.host) == HOST_INVALID)
        return NULL;
    s.access = access_decode(rules, rules_n);
    if (!s.access)
        return NULL;
    h.method = (struct str){method, (uint32_t)strlen(method)};
    h.n = override;
    h.f[0] = (struct field){{NAME, sizeof NAME - 1}, {"DELETE", 6}, F_OTHER};
    why = apply_access(&s, &h, &to, (struct str){target, (uint32_t)strlen(target)}, now_s, NULL, &ruled);
    access_free(s.access);
    strcpy(rule, ruled.rule);
    return REASONS[why].code;
}

int probe_forward(const char *in, size_t n, const char *client, bool tls, const char *secret, char *out, size_t *out_n,
                  char *host, const char **reason)
{
    static __thread struct head h;
    struct host asked;
    struct str path;
    struct forwarded from = {.tls = tls, .secret = str_of(secret)};
    *reason = REASONS[R_BAD_REQUEST].code;
    if (!addr_parse(client, &from.client))
        return -1;
    int used = parse(in, n, &h, reason);
    if (used <= 0)
        return used;
    enum reason why = site_of_h1(&h, &asked, &path);
    if (why == R_NONE) {
        struct request_line line = line_of(&h, path);
        struct out o = {out, 0, *out_n, false};
        from.authority = h.authority;
        render_forward(&o, &h, &line, &from);
        *out_n = o.n;
        memcpy(host, asked.text, asked.len + 1u);
    }
    *reason = REASONS[why].code;
    return why == R_NONE ? used : -1;
}

struct sites *probe_sites(void)
{
    struct sites *s = malloc(sizeof *s);
    if (s)
        sites_init(s);
    return s;
}

void probe_sites_free(struct sites *s)
{
    sites_destroy(s);
    free(s);
}

bool probe_find(struct sites *s, const char *text, uint16_t port, char *hostname, char *target)
{
    struct host host;
    const struct route *r = NULL;
    if (host_canonical(text, strlen(text), false, &host) != HOST_INVALID)
        r = sites_find(s, &host, port, target);
    if (!r)
        return false;
    memcpy(hostname, r->hostname.p, r->hostname.n);
    hostname[r->hostname.n] = 0;
    site_release(r->site);
    return true;
}
