/* What an ingress refuses, removes and adds on the way from a client to a guest. Pure; the egress path's counterpart is
 * verdict.h. */
#ifndef HYPEMAN_EGRESS_FORWARD_H
#define HYPEMAN_EGRESS_FORWARD_H

#include "site.h"
#include "verdict.h"

/* The host name and path that an HTTP/1 head asks for; R_NONE or why not. */
enum reason site_of_h1(const struct head *h, struct host *host, struct str *path);
/* The same for a stream of HTTP/2. */
enum reason site_of_h2(const struct head *h, struct host *host, struct str *path);
/* The token, if it is a path of HTTP-01 (RFC 8555 8.3); empty otherwise. */
struct str acme_token(struct str path);
/* Writes where a plain request is redirected to; false if it does not fit. */
bool render_location(struct out *o, const struct host *host, uint16_t port, struct str path);

/* How a request is announced to the guest. */
struct forwarded {
    struct addr client;
    bool tls;
    struct str authority; /* as the client wrote it */
    struct str secret;    /* name of the header that is for us alone; empty: none */
};

bool forward_field_passes(const struct head *h, const struct field *f, const struct forwarded *from);
bool forward_trailer_passes(const struct field *f, const struct route *r);
void render_forward(struct out *o, const struct head *h, const struct request_line *line, const struct forwarded *from);
void out_forwarded(struct out *o, const struct forwarded *from); /* the value of Forwarded (RFC 7239) */
/* Needs HTTP/2 on the whole way: its application/grpc, not gRPC-Web, which is made for HTTP/1. */
bool is_grpc(const struct head *h);

/* Our own response. */
struct page {
    int status;
    const char *title;
    const char *type;
    struct {
        const char *name, *value;
    } fields[2]; /* further ones */
    unsigned n_fields;
    char body[1600];
    size_t n;
};

void page_add(struct page *p, const char *name, const char *value);
/* For a client: reveals nothing about instances or this host. */
void page_of(struct page *p, enum reason why, bool html, const char *location, const char *proof);

#endif
