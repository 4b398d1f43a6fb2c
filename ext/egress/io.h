/* Buffers, sockets and timers of connections; see io.c. Knows nothing of HTTP or of who a peer is. */
#ifndef HYPEMAN_EGRESS_IO_H
#define HYPEMAN_EGRESS_IO_H

#include "conn.h"

void buf_need(struct loop *l, struct buf *b, size_t room);
void buf_add(struct loop *l, struct buf *b, const char *p, size_t n);
void buf_take(struct loop *l, struct buf *b, size_t n); /* consumes; gives memory back when empty */
void buf_free(struct loop *l, struct buf *b);
void buf_free_spares(struct loop *l); /* at the loop's end */
struct conn *conn_new(struct loop *l, enum kind kind, int fd);
bool conn_watch(struct conn *c);
void conn_kill(struct conn *c);
ssize_t conn_read(struct conn *c); /* > 0 bytes added to `in`; 0 nothing now; -1 end; -2 broken */
void conn_write(struct conn *c, const char *p, size_t n);
void conn_write_chunks(struct conn *c, const char *p,
                       size_t n); /* a piece of an HTTP/1 body that is chunked; in scratch */
void conn_mark(struct conn *c);   /* to be flushed in this round */
void conn_flush(struct conn *c);
void conn_alert(struct conn *c); /* TLS failed: the alert leaves although the connection is about to be killed */
void conn_finish(struct conn *c, bool linger); /* close when all is sent */
size_t conn_room(const struct conn *c);
bool conn_wants_room(struct conn *c); /* full even after a flush: the caller stops and is woken later */
void conn_again(struct conn *c);      /* run once more in this round */
void conn_timer(struct conn *c, int class);
void conn_close_notify(struct conn *c); /* the proper end of TLS, in the buffer */
bool conn_count(struct conn *c);        /* False: its instance, or all, have too many of its kind */
bool conn_take(struct conn *c, enum bound what, int64_t n);
void conn_give(struct conn *c, enum bound what, int64_t n);
size_t conn_watermark(const struct conn *c); /* bytes waiting above which no more is read for it */
bool conn_secret(struct conn *c, const char *p,
                 size_t n); /* conn_write of a head that holds a secret: leaves no copy */

#endif
