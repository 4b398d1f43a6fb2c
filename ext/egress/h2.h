/* What the two HTTP/2 sides share: header blocks gathered from callbacks, and written from heads. */
#ifndef HYPEMAN_EGRESS_H2_H
#define HYPEMAN_EGRESS_H2_H

#include "egress.h"

enum {
    /* What a guest may send on one stream before it is consumed: the protocol's default. More gains nothing at this
     * distance, and libcurl 7.88 may send parts of an upload twice when its socket is full, which this window hardly
     * fills. Clients of ingresses may be far away: where there is room for it, one stream may use the whole
     * connection's window. */
    H2_DOWN_WINDOW = 65535,
    H2_UP_WINDOW = 256 * 1024,
    H2_MAX_STREAMS = 100,
};

void fields_start(struct loop *l, struct fields *f);
/* False: too many or too large, or the block is invalid. */
bool fields_add(struct loop *l, struct fields *f, const uint8_t *name, size_t n, const uint8_t *value, size_t m);
/* Strings now point into the fields' own text; the crumbs of a cookie are one field again (RFC 9113 8.2.3). */
struct head *fields_done(struct loop *l, struct fields *f);
void fields_copy(struct loop *l, struct fields *f, const struct head *h); /* trailers */
void fields_free(struct loop *l, struct fields *f);

/* An array of name-value pairs with lower-case names made in the loop's scratch space. */
struct pairs {
    struct out names;
    unsigned n;
    nghttp2_nv nv[H1_MAX_FIELDS + MAX_SET + 8];
};

void pairs_start(struct loop *l, struct pairs *p);
void pairs_add(struct pairs *p, struct str name, struct str value, bool secret);
void pairs_via(struct pairs *p, const struct head *received);
void pairs_max_forwards(struct pairs *p, const struct head *h);
void pairs_authority(struct pairs *p, const struct destination *to);
void pairs_forwarded(struct pairs *p, const struct forwarded *from);
void pairs_number(struct pairs *p, const char *name, uint64_t value);

/* The last byte of a body was written: flags for nghttp2, which then sends the trailers, if there are any. `route`:
 * they go to a guest, by an ingress; else NULL. */
uint32_t h2_end_body(struct conn *c, int32_t stream, const struct head *trailers, const struct route *route);

nghttp2_session *h2_session(struct conn *c, bool server, nghttp2_session_callbacks *callbacks);
/* Writes frames while there is room; the rest goes when there is room again. */
void h2_pump(struct conn *c);
/* Reads and passes on what has arrived: 0 more later, -1 the connection is over. */
int h2_read(struct conn *c);
ssize_t h2_pull(struct loop *l, struct buf *from, uint8_t *out, size_t n);

#endif
