/* What the four sides (struct side, egress.h) know of each other beside their tables. */
#ifndef HYPEMAN_EGRESS_DOWN_H
#define HYPEMAN_EGRESS_DOWN_H

#include "egress.h"

void down2_consumed(struct xchg *x);        /* request bytes went on: grant window for as many */
void down2_grant(struct xchg *x, size_t n); /* the same for n bytes */
void up2_detach(struct conn *up, struct xchg *x);

void failure_page(struct page *p, const struct xchg *x, enum reason why, const char *detail);
bool down_wants_room(struct xchg *x);
void up_unwait(struct xchg *x); /* x waits for a connection no longer */
void up_unpass(struct conn *down);
void up_ended_early(struct xchg *x); /* the host is done though the request is not */

#endif
