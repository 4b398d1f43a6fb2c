/* Finds texts in a stream and replaces them, however the stream is cut into pieces. Pure.
 *
 * At each position the longest text that matches is replaced, from left to right. Only bytes that may be the beginning
 * of a text are kept back until the next ones decide, so that a stream of events is not delayed.
 */
#ifndef HYPEMAN_EGRESS_SCRUB_H
#define HYPEMAN_EGRESS_SCRUB_H

#include "h1.h"

enum { SCRUB_MAX = 192 };

struct needle {
    struct str text, replacement;
};

/* Zeroed is ready. */
struct needles {
    unsigned n;
    struct needle needle[SCRUB_MAX]; /* the longest first */
    bool first[256];                 /* bytes that one begins with */
    uint8_t pairs[256][32];          /* and pairs of bytes, as bits */
};

void needles_add(struct needles *s, struct str text, struct str replacement);
/* The next piece of p[0..n): bytes consumed, and in *out what replaces them. 0: all that is left may be the beginning
 * of a text, so more is needed; never if it is the `last`. */
size_t scrub_next(const struct needles *s, const char *p, size_t n, bool last, struct str *out);
/* Whether a text is in `in`, ignoring case. */
bool scrub_finds(const struct needles *s, struct str in);

#endif
