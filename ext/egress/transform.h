/* What a credential becomes where the request itself is needed for it: parameters of the query. Pure: from a head to the
 * fields and the path that are written instead (struct matched).
 */
#ifndef HYPEMAN_EGRESS_TRANSFORM_H
#define HYPEMAN_EGRESS_TRANSFORM_H

#include "verdict.h"

enum { TRANSFORM_ROOM = 96 * 1024 }; /* a path and a few fields */

/* Completes `m`, whose rules all are ready, for a request that asks for `path`. What it makes lies in `room`, which holds
 * secrets: to be wiped when the head is written. */
enum reason transform(struct out *room, struct matched *m, const struct head *h, const struct destination *to,
                      struct str path, int64_t now_s);

#endif
