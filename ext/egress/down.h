/* Functions of the four sides (struct side, conn.h) that are not in their tables. */
#ifndef HYPEMAN_EGRESS_DOWN_H
#define HYPEMAN_EGRESS_DOWN_H

#include "egress.h"

void down2_consumed(struct xchg *x);        /* request bytes were passed on: grant window for as many */
void down2_grant(struct xchg *x, size_t n); /* the same for n bytes */
void up2_detach(struct conn *up, struct xchg *x);

void failure_page(struct page *p, const struct xchg *x, enum reason why, const char *detail);
bool down_wants_room(struct xchg *x);
void up_unwait(struct xchg *x); /* x no longer waits for a connection */
void up_unpass(struct conn *down);
void up_ended_early(struct xchg *x); /* the host is done though the request is not */

#endif
