/* The four corners of xchg.c: the guest's side and the host's side, in HTTP/1 and HTTP/2. */
#ifndef HYPEMAN_EGRESS_DOWN_H
#define HYPEMAN_EGRESS_DOWN_H

#include "egress.h"

void down1_head(struct xchg *x, const struct head *h, enum body body, uint64_t length);
void down1_data(struct xchg *x, const char *p, size_t n);
void down1_end(struct xchg *x, const struct head *trailers);
void down1_fail(struct xchg *x, enum reason why, const char *detail, bool told);
void down1_finished(struct xchg *x);

void down2_head(struct xchg *x, const struct head *h, enum body body, uint64_t length);
void down2_data(struct xchg *x, const char *p, size_t n);
void down2_end(struct xchg *x, const struct head *trailers);
void down2_fail(struct xchg *x, enum reason why, const char *detail, bool told);
void down2_finished(struct xchg *x);
void down2_resume(struct xchg *x);   /* its upstream connection is ready */
void down2_consumed(struct xchg *x); /* request bytes went on: grant window for as many */

void up1_data(struct xchg *x, const char *p, size_t n);
void up1_end(struct xchg *x, const struct head *trailers);

void up2_abandon(struct conn *up, struct xchg *x);
void up2_detach(struct conn *up, struct xchg *x);

size_t error_body(char *out, size_t cap, enum reason why, const char *detail);
bool down_wants_room(struct xchg *x);
void up_unwait(struct xchg *x);   /* x waits for a connection no longer */
void up_unpass(struct conn *down);
void up_ended_early(struct xchg *x); /* the host is done though the request is not */

#endif
