/* See forward.h. */
#define _GNU_SOURCE
#include "forward.h"

#include <stdio.h>
#include <string.h>

enum reason site_of_h1(const struct head *h, struct host *host, struct str *path)
{
    uint16_t port;
    struct str authority = h->authority;
    *path = h->target;
    if (h1_is(h->method, "connect") || h1_is(h->method, "trace"))
        return R_METHOD;
    if (!h->hosts)
        return R_BAD_REQUEST;
    if (h->target.p[0] != '/' && !(h->target.n == 1 && h->target.p[0] == '*' && h1_is(h->method, "options"))) {
        struct str named;
        if (!split_absolute(h->target, "http://", &named, path) && !split_absolute(h->target, "https://", &named, path))
            return R_BAD_REQUEST;
        if (!h1_same(named, authority)) /* two names for one request */
            return R_BAD_REQUEST;
        if (!path->n)
            *path = (struct str){h1_is(h->method, "options") ? "*" : "/", 1};
    }
    if (authority.n && authority.p[authority.n - 1] == ':') /* an empty port */
        authority.n--;
    return host_parse_authority(authority.p, authority.n, host, &port) == HOST_INVALID ? R_NO_SITE : R_NONE;
}

enum reason site_of_h2(const struct head *h, struct host *host, struct str *path)
{
    uint16_t port;
    bool asterisk = h->target.n == 1 && h->target.p[0] == '*' && h1_is(h->method, "options");
    *path = h->target;
    if (h1_is(h->method, "connect") || h1_is(h->method, "trace"))
        return R_METHOD;
    if (!h1_is_token(h->method.p, h->method.n) || !h1_is_target(h->target.p, h->target.n)
        || (h->target.p[0] != '/' && !asterisk))
        return R_BAD_REQUEST;
    return host_parse_authority(h->authority.p, h->authority.n, host, &port) == HOST_INVALID ? R_NO_SITE : R_NONE;
}

struct str acme_token(struct str path)
{
    static const char PREFIX[] = "/.well-known/acme-challenge/";
    uint32_t n = sizeof PREFIX - 1;
    bool fits = path.n > n && memcmp(path.p, PREFIX, n) == 0;
    return fits ? (struct str){path.p + n, path.n - n} : (struct str){NULL, 0};
}

bool render_location(struct out *o, const struct host *host, uint16_t port, struct str path)
{
    out_text(o, "https://");
    out_add(o, host->text, host->len);
    if (port != 443) {
        out_add(o, ":", 1);
        out_number(o, port);
    }
    if (path.p[0] != '/')
        out_add(o, "/", 1);
    if (path.p[0] != '*')
        out_add(o, path.p, path.n);
    out_add(o, "", 1);
    return !o->over;
}

static bool begins_with(struct str name, const char *text)
{
    uint32_t n = (uint32_t)strlen(text);
    return name.n >= n && h1_same_variable((struct str){name.p, n}, (struct str){text, n});
}

/* What a client claims about its own forwarding, in all spellings that CGI regards as equal. */
static bool is_claim(struct str name, struct str secret)
{
    char first = name.p[0] | 0x20;
    if (first == 'x' && (begins_with(name, "x-forwarded-") || (name.n == 9 && begins_with(name, "x-real-ip"))))
        return true;
    if (first == 'f' && name.n == 9 && begins_with(name, "forwarded"))
        return true;
    return secret.n && h1_same_variable(name, secret);
}

bool forward_field_passes(const struct head *h, const struct field *f, const struct forwarded *from)
{
    static const struct matched NONE = {0};
    return request_field_passes(h, f, &NONE) && !is_claim(f->name, from->secret);
}

bool forward_trailer_passes(const struct field *f, const struct route *r)
{
    return trailer_passes(f, NULL) && !is_claim(f->name, r->header);
}

void out_forwarded(struct out *o, const struct forwarded *from)
{
    char client[INET6_ADDRSTRLEN];
    bool v4 = addr_is_v4(from->client);
    addr_text(from->client, client);
    out_text(o, v4 ? "for=" : "for=\"[");
    out_text(o, client);
    out_text(o, v4 ? ";host=\"" : "]\";host=\"");
    out_add(o, from->authority.p, from->authority.n);
    out_text(o, from->tls ? "\";proto=https" : "\";proto=http");
}

bool is_grpc(const struct head *h)
{
    static const struct str GRPC = {"application/grpc", 16};
    for (unsigned i = 0; i < h->n; i++) {
        struct str value = h->f[i].value;
        if (h->f[i].name.n != 12 || value.n < GRPC.n || !h1_is(h->f[i].name, "content-type"))
            continue;
        char next = value.n > GRPC.n ? value.p[GRPC.n] : ';';
        return h1_same((struct str){value.p, GRPC.n}, GRPC)
            && (next == ';' || next == '+' || next == ' ' || next == '\t');
    }
    return false;
}

void render_forward(struct out *o, const struct head *h, const struct request_line *line, const struct forwarded *from)
{
    char client[INET6_ADDRSTRLEN];
    addr_text(from->client, client);
    struct str node = str_of(client), scheme = str_of(from->tls ? "https" : "http");
    out_request_line(o, h, line->path);
    out_field(o, str_of("Host"), from->authority);
    for (unsigned i = 0; i < h->n; i++)
        if (forward_field_passes(h, &h->f[i], from))
            out_field(o, h->f[i].name, h->f[i].value);
    out_field(o, str_of("X-Forwarded-For"), node);
    out_field(o, str_of("X-Forwarded-Proto"), scheme);
    out_field(o, str_of("X-Forwarded-Host"), from->authority);
    out_text(o, "Forwarded: ");
    out_forwarded(o, from);
    out_add(o, "\r\n", 2);
    out_max_forwards(o, h);
    out_framing(o, h, line);
    out_add(o, "\r\n", 2);
}

static const struct {
    enum reason why;
    const char *title, *message;
} PAGES[] = {
    {R_BAD_REQUEST, "Bad Request", "The request is malformed or ambiguous."},
    {R_HEAD_TOO_LARGE, "Request Header Fields Too Large", "The header of the request is too large."},
    {R_METHOD, "Method Not Allowed", "This method is not supported."},
    {R_EXPECTATION, "Expectation Failed", "The request has an expectation that is not supported."},
    {R_CLIENT_TIMEOUT, "Request Timeout", "The request did not arrive in time."},
    {R_MOVED, "Permanent Redirect", "This site has moved."},
    {R_WANTS_TLS, "Forbidden", "This site requires HTTPS."},
    {R_HOST_MISMATCH, "Misdirected Request", "This connection is for another site."},
    {R_NO_SITE, "Not Found", "There is no site with this name on this server."},
    {R_NO_HEADER, "Unauthorized", "This site requires a header that is missing or wrong."},
    {R_NOT_RUNNING, "Service Unavailable", "The service behind this address is not running at the moment."},
    {R_BUSY, "Service Unavailable", "There are too many connections or requests at the moment."},
    {R_CONNECT, "Bad Gateway", "The service behind this address does not accept connections."},
    {R_CONNECT_TIMEOUT, "Gateway Timeout", "The service behind this address does not answer."},
    {R_UPSTREAM_CLOSED, "Bad Gateway", "The service behind this address closed the connection."},
    {R_UPSTREAM_RESPONSE, "Bad Gateway", "The service behind this address sent an invalid response."},
    {R_UPSTREAM_TIMEOUT, "Gateway Timeout", "The service behind this address does not answer."},
};

void page_add(struct page *p, const char *name, const char *value)
{
    p->fields[p->n_fields].name = name;
    p->fields[p->n_fields++].value = value;
}

void page_of(struct page *p, enum reason why, bool html, const char *location, const char *proof)
{
    const char *title = "Error", *message = "The request cannot be processed.";
    p->status = REASONS[why].status;
    for (size_t i = 0; i < sizeof PAGES / sizeof *PAGES; i++)
        if (PAGES[i].why == why) {
            title = PAGES[i].title;
            message = PAGES[i].message;
        }
    p->title = title;
    p->type = html ? "text/html; charset=utf-8" : "text/plain; charset=utf-8";
    p->n = p->n_fields = 0;
    if (p->status == 200) { /* an answer and nothing else */
        p->title = "OK";
        p->type = "text/plain";
        p->n = proof ? strlen(proof) : 0;
        memcpy(p->body, proof ? proof : "", p->n);
        return;
    }
    page_add(p, "cache-control", "no-store");
    if (location)
        page_add(p, "location", location);
    if (p->status == 503 || p->status == 504)
        page_add(p, "retry-after", "5");
    int n = html ? snprintf(p->body, sizeof p->body,
                            "<!doctype html><html lang=en><meta charset=utf-8><title>%d %s</title>"
                            "<h1>%d %s</h1><p>%s</p></html>\n",
                            p->status, title, p->status, title, message)
                 : snprintf(p->body, sizeof p->body, "%d %s: %s\n", p->status, title, message);
    p->n = (size_t)n;
}
