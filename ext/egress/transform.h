/* Credentials that depend on the request itself: parameters of the query, signatures. Pure: from a head, and the body
 * where it must be complete, to the fields and the path that are written instead (struct matched).
 */
#ifndef HYPEMAN_EGRESS_TRANSFORM_H
#define HYPEMAN_EGRESS_TRANSFORM_H

#include "verdict.h"

enum {
    TRANSFORM_ROOM = 96 * 1024,       /* a path and a few fields */
    TRANSFORM_BODY = 4 * 1024 * 1024, /* of a body that must be complete */
};

struct body_text {
    char *p; /* NULL: not gathered */
    size_t n;
};

enum content { CONTENT_OTHER, CONTENT_JSON, CONTENT_FORM, CONTENT_KINDS };

/* What a placeholder could be in, by the request's Content-Type. */
enum content content_of(const struct head *h);
/* Whether the body must be complete before the head can be written. */
bool transform_needs_body(const struct matched *m, const struct head *h, struct str path);
/* Completes `m`, whose rules all are ready, for a request that asks for `path`. Its output is in `room`, which holds
 * secrets: to be wiped when the head is written; `work` is overwritten. The body may be changed in place. */
enum reason transform(struct out *room, struct out *work, struct matched *m, const struct head *h,
                      const struct destination *to, struct str path, struct body_text body, int64_t now_s);

#endif
