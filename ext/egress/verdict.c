/* See verdict.h. */
#define _GNU_SOURCE
#include "verdict.h"

#include <string.h>

const struct reason_text REASONS[R_COUNT] = {
    [R_NONE] = {200, "ok", "", NEXT_NEVER},
    [R_BAD_REQUEST] = {400, "bad_request", "the request is malformed or ambiguous", NEXT_CHANGE},
    [R_HEAD_TOO_LARGE] = {431, "head_too_large",
                          "the request head is larger than 32 KB or has over 128 fields, or its rules add over 64 KB",
                          NEXT_CHANGE},
    [R_BAD_HOST] = {400, "bad_host", "the host is not a plain name or address", NEXT_CHANGE},
    [R_HOST_MISMATCH] = {421, "host_mismatch", "Host differs from the name this connection was opened for",
                         NEXT_CHANGE},
    [R_METHOD] = {405, "method_not_allowed", "this method is not forwarded to this host", NEXT_NEVER},
    [R_EXPECTATION] = {417, "expectation_failed", "only the expectation 100-continue is supported", NEXT_CHANGE},
    [R_PLACEHOLDER] = {403, "placeholder_outside_hosts",
                       "the request has a placeholder for a credential that is not allowed for this host", NEXT_CHANGE},
    [R_HOST_DENIED] = {403, "host_denied", "no rule of this instance covers the host", NEXT_OTHER_HOST},
    [R_ADDRESS_LITERAL] = {403, "address_literal", "this instance may connect to hosts only by name", NEXT_OTHER_HOST},
    [R_ADDRESS_DENIED] = {403, "address_denied", "the host has a private, local or otherwise refused address",
                          NEXT_OTHER_HOST},
    [R_PORT] = {403, "port_denied", "ports other than 443 for HTTPS and 80 for HTTP need a rule that names them",
                NEXT_OTHER_HOST},
    [R_NO_NAME] = {403, "no_server_name", "this instance may use TLS only with a server name", NEXT_CHANGE},
    [R_MAX_FORWARDS] = {200, "max_forwards", "", NEXT_NEVER},
    [R_RATE] = {429, "rate_limited", "this instance makes too many requests", NEXT_LATER},
    [R_UNREGISTERED] = {403, "unregistered", "this instance is no longer registered", NEXT_NEVER},
    [R_RESOLVE] = {502, "name_not_resolved", "the host's name could not be resolved", NEXT_OTHER_HOST},
    [R_CONNECT] = {502, "connect_failed", "the host refused the connection or cannot be reached", NEXT_LATER},
    [R_CONNECT_TIMEOUT] = {504, "connect_timeout", "the host did not answer in time", NEXT_LATER},
    [R_CERTIFICATE] = {502, "upstream_certificate", "the host's certificate is not valid for its name", NEXT_NEVER},
    [R_UPSTREAM_TLS] = {502, "upstream_tls", "the TLS handshake with the host failed", NEXT_LATER},
    [R_UPSTREAM_CLOSED] = {502, "upstream_closed", "the host closed the connection before it answered", NEXT_LATER},
    [R_UPSTREAM_RESPONSE] = {502, "upstream_response", "the host's response is malformed", NEXT_NEVER},
    [R_UPSTREAM_TIMEOUT] = {504, "upstream_timeout", "the host did not answer in time", NEXT_LATER},
    [R_CLIENT_TIMEOUT] = {408, "request_timeout", "the request did not arrive in time", NEXT_LATER},
    [R_CLIENT_CLOSED] = {499, "client_closed", "the client closed the connection", NEXT_LATER},
    [R_CLIENT_TLS] = {400, "client_tls", "the TLS handshake with the client failed", NEXT_CHANGE},
    [R_NOT_TLS] = {400, "not_tls", "only TLS is allowed through CONNECT", NEXT_CHANGE},
    [R_BUSY] = {503, "too_many_at_once", "this instance, or the host, has too many connections or requests open",
                NEXT_LATER},
    [R_CREDENTIAL] = {503, "credential_unavailable", "the credential for this host has no valid value at the moment",
                      NEXT_LATER},
    [R_SIGNATURE] = {403, "signature_refused", "the request's signature cannot be replaced", NEXT_CHANGE},
    [R_TOO_LARGE] = {413, "body_too_large",
                     "the body must be complete before it is sent to this host, and is too large for that",
                     NEXT_CHANGE},
    [R_UNSEARCHABLE] = {502, "unsearchable_response",
                        "the response is encoded or partial, so it cannot be searched for credentials", NEXT_NEVER},
    [R_DRAINING] = {503, "draining", "the proxy is about to stop", NEXT_LATER},
    [R_NO_RULE] = {403, "no_rule", "no rule of this instance allows this request", NEXT_OTHER_HOST},
    [R_HOST_RULE] = {403, "host_denied_by_rule", "a rule of this instance denies this host", NEXT_OTHER_HOST},
    [R_REQUEST_RULE] = {403, "request_denied", "a rule of this instance denies this method or path", NEXT_NEVER},
    [R_PATH] = {400, "ambiguous_path",
                "servers could interpret the path in different ways, and a rule decides by the path", NEXT_CHANGE},
    [R_OVERRIDE] = {403, "method_override", "a header replaces the method, and a rule decides by the method",
                    NEXT_CHANGE},
    [R_NOT_APPROVED] = {403, "not_approved", "the request was held for approval and denied", NEXT_NEVER},
    [R_APPROVAL_PENDING] = {403, "approval_pending", "the request needs an approval that has not been given in time",
                            NEXT_APPROVAL},
    [R_PG_PROTOCOL] = {400, "postgres_protocol", "this is not the Postgres protocol 3 as it is expected here",
                       NEXT_CHANGE},
    [R_PG_TLS] =
        {403, "tls_required",
         "connections to this port need TLS with a server name: connect by name with sslmode=require or stricter",
         NEXT_CHANGE},
    [R_MY_PROTOCOL] = {400, "mysql_protocol", "this is not the protocol of MySQL as it is expected here", NEXT_CHANGE},
    [R_MY_HOST] = {403, "ambiguous_host",
                   "credentials for several hosts at this port could be meant: connect with TLS and a server name",
                   NEXT_CHANGE},
    [R_LOGIN_USER] = {403, "role_denied", "no credential of this instance is for this user and database", NEXT_CHANGE},
    [R_LOGIN_PASSWORD] = {401, "placeholder_expected", "the password must be the placeholder of the credential",
                          NEXT_CHANGE},
    [R_LOGIN_UPSTREAM] = {502, "upstream_authentication",
                          "the server does not authenticate as the rule demands, or does not know the password",
                          NEXT_NEVER},
    [R_NO_SITE] = {404, "no_site", "no ingress has a rule for the host, or there is no such instance", NEXT_NEVER},
    [R_NO_HEADER] = {401, "header_missing", "the header that the ingress requires is missing or wrong", NEXT_CHANGE},
    [R_NOT_RUNNING] = {503, "not_running", "the instance is not running", NEXT_LATER},
    [R_MOVED] = {308, "moved", "", NEXT_CHANGE},
    [R_WANTS_TLS] = {403, "wants_tls", "the site requires HTTPS", NEXT_CHANGE},
    [R_PROOF] = {200, "proof", "", NEXT_NEVER},
    [R_DROPPED] = {503, "ingress_deleted", "the ingress was deleted during the request", NEXT_NEVER},
};

static bool same_host(const struct host *a, const struct host *b)
{
    return a->kind == b->kind && a->len == b->len && memcmp(a->text, b->text, a->len) == 0;
}

/* Cuts "scheme://authority" off an absolute-form target. */
bool split_absolute(struct str target, const char *scheme, struct str *authority, struct str *path)
{
    size_t n = strlen(scheme);
    if (target.n < n || !h1_same((struct str){target.p, (uint32_t)n}, (struct str){scheme, (uint32_t)n}))
        return false;
    const char *p = target.p + n, *end = target.p + target.n, *q = p;
    while (q < end && *q != '/' && *q != '?')
        q++;
    *authority = (struct str){p, (uint32_t)(q - p)};
    *path = (struct str){q, (uint32_t)(end - q)};
    return authority->n > 0; /* a path that is empty or begins with '?' is completed below, and in render_request */
}

enum reason target_of_h1(const struct head *h, const struct origin *from, struct destination *to, struct str *path)
{
    struct str authority = h->authority, named = {NULL, 0};
    struct host host;
    uint16_t port = 0;
    *path = h->target;
    if (h1_is(h->method, "connect"))
        return R_METHOD; /* the first CONNECT of a connection is handled elsewhere */
    if (h->target.p[0] != '/') {
        bool asterisk = h->target.n == 1 && h->target.p[0] == '*' && h1_is(h->method, "options");
        if (!asterisk && !split_absolute(h->target, from->bound ? "https://" : "http://", &named, path))
            return R_BAD_REQUEST;
        if (!asterisk && !path->n) /* OPTIONS of a whole host: RFC 9112 3.2.4 */
            *path = (struct str){h1_is(h->method, "options") ? "*" : "/", 1};
    } else if (!from->bound && from->explicit_proxy) {
        return R_BAD_REQUEST; /* asked as an origin server, which we are not */
    }
    if (named.p)
        authority = named; /* Host is ignored then: RFC 9112 3.2.2 */
    if (!h->hosts && !named.p) {
        if (!from->bound)
            return R_BAD_REQUEST;
        *to = *from->bound; /* HTTP/1.0 without Host */
        return R_NONE;
    }
    if (host_parse_authority(authority.p, authority.n, &host, &port) == HOST_INVALID)
        return R_BAD_HOST;
    if (from->bound) {
        if (!same_host(&host, &from->bound->host))
            return R_HOST_MISMATCH;
        if (port ? port != from->bound->port : false)
            return R_HOST_MISMATCH;
        *to = *from->bound;
        return R_NONE;
    }
    if (!from->explicit_proxy && port && port != from->port)
        return R_HOST_MISMATCH;
    to->host = host;
    to->port = from->explicit_proxy ? (port ? port : 80) : from->port;
    to->tls = false;
    return R_NONE;
}

enum reason target_of_h2(const struct head *h, const struct destination *bound)
{
    struct host host;
    uint16_t port;
    if (h1_is(h->method, "connect"))
        return R_METHOD;
    bool asterisk = h->target.n == 1 && h->target.p[0] == '*' && h1_is(h->method, "options");
    if (!h1_is_token(h->method.p, h->method.n) || !h1_is_target(h->target.p, h->target.n)
        || (h->target.p[0] != '/' && !asterisk))
        return R_BAD_REQUEST;
    if (host_parse_authority(h->authority.p, h->authority.n, &host, &port) == HOST_INVALID)
        return R_BAD_HOST;
    if (!same_host(&host, &bound->host) || (port && port != bound->port))
        return R_HOST_MISMATCH;
    return R_NONE;
}

static bool has_placeholder(const struct head *h, struct str placeholder)
{
    if (!placeholder.n)
        return false;
    for (unsigned i = 0; i < h->n; i++)
        if (h->f[i].value.n >= placeholder.n && memmem(h->f[i].value.p, h->f[i].value.n, placeholder.p, placeholder.n))
            return true;
    return false;
}

void set_field(struct matched *m, struct str name, struct str value)
{
    if (m->fields < MAX_SET)
        m->set[m->fields++] = (struct set_field){name, value};
}

static bool overrides_method(const struct head *h)
{
    for (unsigned i = 0; i < h->n; i++)
        if (h1_is(h->f[i].name, "x-http-method-override") || h1_is(h->f[i].name, "x-http-method")
            || h1_is(h->f[i].name, "x-method-override"))
            return true;
    return false;
}

static void note_rule(struct ruled *out, const struct access_rule *rule, enum decision decision)
{
    struct str name = rule ? rule->name : (struct str){"default", 7};
    out->decision = (uint8_t)decision;
    memcpy(out->rule, name.p, name.n);
    out->rule[name.n] = 0;
}

static void note_target(struct ruled *out, const struct access_rule *rule, struct str target)
{
    const char *query = memchr(target.p, '?', target.n);
    uint32_t n = 0;
    if (rule && rule->record != RECORD_HOST)
        n = rule->record == RECORD_PATH && query ? (uint32_t)(query - target.p) : target.n;
    n = n < TARGET_MAX - 1 ? n : TARGET_MAX - 1;
    memcpy(out->target, target.p, n);
    out->target[n] = 0;
}

enum reason apply_access(const struct snapshot *s, const struct head *h, const struct destination *to, struct str path,
                         int64_t now_s, const char *approved, struct ruled *out)
{
    if (!s->access) {
        out->decision = D_NONE;
        out->rule[0] = out->target[0] = 0;
        return R_NONE;
    }
    struct access_request r = {&to->host, to->port, h->method, path, now_s};
    struct access_answer a = access_decide(s->access, &r);
    enum reason why = R_NONE;
    if (a.ambiguous)
        why = R_PATH;
    else if (a.action == ACCESS_DENY)
        why = !a.rule ? R_NO_RULE : a.rule->methods || a.rule->paths ? R_REQUEST_RULE : R_HOST_RULE;
    else if (a.has_method && overrides_method(h))
        why = R_OVERRIDE;
    else if (a.action == ACCESS_ASK
             && !(approved && a.rule && strlen(approved) == a.rule->name.n
                  && memcmp(approved, a.rule->name.p, a.rule->name.n) == 0))
        why = R_APPROVAL_PENDING;
    enum decision decision = why == R_APPROVAL_PENDING ? D_HELD
        : why != R_NONE                                ? D_DENIED
        : a.action == ACCESS_ASK                       ? D_APPROVED
                                                       : D_ALLOWED;
    if (why != R_NONE && access_observes(s->access)) {
        decision = D_OBSERVED;
        why = R_NONE;
    }
    note_rule(out, a.rule, decision);
    note_target(out, a.rule, path);
    return why;
}

void look_at_access(const struct snapshot *s, const struct destination *to, int64_t now_s, bool *pass,
                    struct ruled *out)
{
    struct access_answer first;
    out->decision = D_NONE;
    out->rule[0] = out->target[0] = 0;
    *pass = true;
    if (!s->access)
        return;
    *pass = access_look(s->access, &to->host, to->port, now_s, &first) == LOOK_PASS;
    note_rule(out, first.rule, first.action == ACCESS_ALLOW ? D_ALLOWED : D_OBSERVED);
}

/* The response must be readable for echo.c: not compressed, and no part that begins in the middle of a credential. */
static void ask_for_whole_text(struct matched *m)
{
    set_field(m, str_of("accept-encoding"), str_of("identity"));
    set_field(m, str_of("range"), (struct str){NULL, 0});
    set_field(m, str_of("if-range"), (struct str){NULL, 0});
}

enum reason apply_policy(const struct snapshot *s, const struct head *h, const struct destination *to, int64_t now_s,
                         struct matched *out)
{
    out->n = out->fields = out->scrubs = 0;
    out->path = (struct str){NULL, 0};
    out->transforms = out->unready = out->certified = false;
    out->detail = NULL;
    if (s->unmatched != UNMATCHED_PASS && to->host.kind != HOST_NAME)
        return R_ADDRESS_LITERAL;
    if (!snapshot_allows_port(s, &to->host, to->port, to->tls, now_s))
        return R_PORT;
    bool covered = false;
    for (unsigned i = 0; i < s->n; i++) {
        const struct rule *r = &s->rules[i];
        bool covers = !rule_is_login(r) && rule_covers(r, &to->host, to->port);
        covered |= covers;
        if (covers && to->tls && r->kind == RULE_SCRUB && out->scrubs < MAX_SCRUBS)
            out->scrub[out->scrubs++] = r;
        else if (covers && to->tls && r->kind != RULE_SCRUB && out->n < MAX_MATCHED)
            out->rules[out->n++] = r; /* never on plain HTTP: anyone on the way could read it */
    }
    for (unsigned i = 0; i < s->n; i++) {
        const struct rule *r = &s->rules[i];
        bool here = false; /* a credential may have several rules; one that covers the host is enough */
        for (unsigned k = 0; k < out->n; k++)
            here |= h1_same(out->rules[k]->placeholder, r->placeholder);
        if (!here && has_placeholder(h, r->placeholder))
            return R_PLACEHOLDER;
    }
    if (!covered && s->unmatched == UNMATCHED_DENY)
        return R_HOST_DENIED;
    if (out->n && h1_is(h->method, "trace"))
        return R_METHOD; /* it would hand the credential back in its answer */
    if (out->scrubs)
        ask_for_whole_text(out);
    for (unsigned i = 0; i < out->n; i++) {
        const struct rule *r = out->rules[i];
        out->unready |= !rule_is_ready(r, now_s);
        if (r->kind == RULE_HEADER)
            set_field(out, r->name, r->value);
        else if (r->kind == RULE_MTLS)
            out->certified = true;
        else
            out->transforms = true;
    }
    return R_NONE;
}

enum reason decide_request(const struct snapshot *s, const struct head *h, const struct destination *to,
                           struct str path, int64_t now_s, const char *approved, struct ruled *ruled,
                           struct matched *out)
{
    enum reason why = apply_access(s, h, to, path, now_s, approved, ruled);
    out->detail = NULL;
    if (why != R_NONE && why != R_APPROVAL_PENDING)
        return why;
    enum reason refused = apply_policy(s, h, to, now_s, out);
    return refused != R_NONE ? refused : why;
}

/* Whether the client may be spoken to about this Upgrade: h2c would open a way around all that is decided here. */
bool may_upgrade(const struct head *h)
{
    if (!h->connection_upgrade || h->minor != 1 || h->chunked || h->content_length > 0)
        return false;
    unsigned n = 0;
    for (unsigned i = 0; i < h->n; i++)
        if (h->f[i].id == F_UPGRADE) {
            n++;
            if (h1_list_has(h->f[i].value, (struct str){"h2c", 3}) || h1_list_has(h->f[i].value, (struct str){"h2", 2}))
                return false;
        }
    return n == 1;
}

bool is_idempotent(const struct head *h)
{
    return h1_is(h->method, "get") || h1_is(h->method, "head") || h1_is(h->method, "options") || h1_is(h->method, "put")
        || h1_is(h->method, "delete");
}

int64_t max_forwards(const struct head *h)
{
    if (!h1_is(h->method, "options") && !h1_is(h->method, "trace"))
        return -1;
    for (unsigned i = 0; i < h->n; i++)
        if (h->f[i].id == F_MAX_FORWARDS) {
            int64_t left = h1_content_length(h->f[i].value);
            return left < 0 ? -2 : left;
        }
    return -1;
}

enum reason check_hops(const struct head *h)
{
    int64_t left = max_forwards(h);
    if (left == 0)
        return h1_is(h->method, "trace") ? R_METHOD : R_MAX_FORWARDS;
    return left == -2 ? R_BAD_REQUEST : R_NONE;
}

bool is_nominated(const struct head *h, struct str name)
{
    for (unsigned i = 0; i < h->n; i++)
        if (h->f[i].id == F_CONNECTION && h1_list_has(h->f[i].value, name))
            return true;
    return false;
}

static bool is_injected(const struct matched *m, struct str name)
{
    for (unsigned i = 0; i < m->fields; i++)
        if (h1_same_variable(m->set[i].name, name))
            return true;
    return false;
}

static bool has_connection_options(const struct head *h)
{
    for (unsigned i = 0; i < h->n; i++)
        if (h->f[i].id == F_CONNECTION)
            return true;
    return false;
}

bool request_field_passes(const struct head *h, const struct field *f, const struct matched *m)
{
    switch (f->id) {
    case F_HOST: /* written anew, from what was decided */
    case F_CONTENT_LENGTH:
    case F_TRANSFER_ENCODING:
    case F_CONNECTION:
    case F_KEEP_ALIVE:
    case F_PROXY_CONNECTION:
    case F_PROXY_AUTHORIZATION:
    case F_TE:
    case F_UPGRADE:
    case F_HTTP2_SETTINGS:
        return false;
    case F_MAX_FORWARDS:
        if (h1_is(h->method, "options") || h1_is(h->method, "trace"))
            return false; /* written anew, one less */
        break;
    case F_EXPECT:
        if (h->minor != 1)
            return false; /* HTTP/1.0 has no 100 */
        break;
    case F_AUTHORIZATION:
    case F_COOKIE:
        if (m->n)
            return false; /* a host that gets a credential of ours gets no other identity beside it */
        break;
    default:
        break;
    }
    if (is_injected(m, f->name))
        return false;
    return !has_connection_options(h) || !is_nominated(h, f->name);
}

bool response_field_passes(const struct head *h, const struct field *f)
{
    switch (f->id) {
    case F_CONTENT_LENGTH: /* written anew */
    case F_TRANSFER_ENCODING:
    case F_CONNECTION:
    case F_KEEP_ALIVE:
    case F_PROXY_CONNECTION:
    case F_PROXY_AUTHENTICATE:
    case F_UPGRADE:
    case F_TE:
    case F_HYPEMAN: /* only we say this */
    case F_ALT_SVC: /* would send the client to QUIC, which has no way out */
        return false;
    default:
        return !has_connection_options(h) || !is_nominated(h, f->name);
    }
}

bool trailer_passes(const struct field *f, const struct matched *m)
{
    if (f->id != F_OTHER && f->id != F_TRAILER)
        return false;
    return !m || !is_injected(m, f->name);
}

void out_add(struct out *o, const char *p, size_t n)
{
    if (o->cap - o->n < n) {
        o->over = true;
        return;
    }
    memcpy(o->p + o->n, p, n);
    o->n += n;
}

void out_text(struct out *o, const char *text)
{
    out_add(o, text, strlen(text));
}

void out_number(struct out *o, uint64_t v)
{
    char digits[20];
    unsigned n = 0;
    do
        digits[sizeof digits - ++n] = (char)('0' + v % 10);
    while (v /= 10);
    out_add(o, digits + sizeof digits - n, n);
}

void out_field(struct out *o, struct str name, struct str value)
{
    out_add(o, name.p, name.n);
    out_add(o, ": ", 2);
    out_add(o, value.p, value.n);
    out_add(o, "\r\n", 2);
}

void out_authority(struct out *o, const struct destination *to)
{
    bool v6 = to->host.kind == HOST_IP && memchr(to->host.text, ':', to->host.len);
    if (v6)
        out_add(o, "[", 1);
    out_add(o, to->host.text, to->host.len);
    if (v6)
        out_add(o, "]", 1);
    if (to->port != (to->tls ? 443 : 80)) {
        out_add(o, ":", 1);
        out_number(o, to->port);
    }
}

bool body_is_undefined(const struct head *h, const struct request_line *line)
{
    bool carries = line->body == BODY_CHUNKED || (line->body == BODY_LENGTH && line->length);
    return carries && !h1_is(h->method, "post") && !h1_is(h->method, "put") && !h1_is(h->method, "patch");
}

void out_via(struct out *o, int minor)
{
    out_text(o, minor == 2 ? "Via: 2 hypeman\r\n" : minor == 1 ? "Via: 1.1 hypeman\r\n" : "Via: 1.0 hypeman\r\n");
}

void out_max_forwards(struct out *o, const struct head *h)
{
    int64_t left = max_forwards(h);
    if (left <= 0)
        return;
    out_text(o, "Max-Forwards: ");
    out_number(o, (uint64_t)left - 1);
    out_add(o, "\r\n", 2);
}

void out_request_line(struct out *o, const struct head *h, struct str path)
{
    out_add(o, h->method.p, h->method.n);
    out_add(o, " ", 1);
    if (path.p[0] == '?')
        out_add(o, "/", 1); /* absolute form with an empty path */
    out_add(o, path.p, path.n);
    out_text(o, " HTTP/1.1\r\n");
}

void out_framing(struct out *o, const struct head *h, const struct request_line *line)
{
    bool close = body_is_undefined(h, line);
    if (line->upgrade) {
        for (unsigned i = 0; i < h->n; i++)
            if (h->f[i].id == F_UPGRADE)
                out_field(o, h->f[i].name, h->f[i].value);
        out_text(o, "Connection: upgrade\r\n");
    } else if (h->te_trailers) {
        out_text(o, close ? "TE: trailers\r\nConnection: TE, close\r\n" : "TE: trailers\r\nConnection: TE\r\n");
    } else if (close) {
        out_text(o, "Connection: close\r\n");
    }
    if (line->body == BODY_CHUNKED) {
        out_text(o, "Transfer-Encoding: chunked\r\n");
    } else if (line->body == BODY_LENGTH) {
        out_text(o, "Content-Length: ");
        out_number(o, line->length);
        out_add(o, "\r\n", 2);
    }
}

void render_request(struct out *o, const struct head *h, const struct request_line *line, const struct destination *to,
                    const struct matched *m)
{
    out_request_line(o, h, m->path.n ? m->path : line->path);
    out_text(o, "Host: ");
    out_authority(o, to);
    out_add(o, "\r\n", 2);
    for (unsigned i = 0; i < h->n; i++)
        if (request_field_passes(h, &h->f[i], m))
            out_field(o, h->f[i].name, h->f[i].value);
    out_max_forwards(o, h);
    out_via(o, h->http2 ? 2 : h->minor);
    out_framing(o, h, line);
    for (unsigned i = 0; i < m->fields; i++)
        if (m->set[i].value.p)
            out_field(o, m->set[i].name, m->set[i].value);
    out_add(o, "\r\n", 2);
}
