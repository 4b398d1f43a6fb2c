/* The parts of the data plane and how they hold together. (Public interface: engine.h. The process around it: confine.c,
 * hypeman/egress/engine.py.) What stands above may call what stands below, and what stands beside it in the same row.
 *
 *   engine      policies, questions, records, counters, for the program       engine.c
 *   loop        one per thread: epoll, timers, inbox                          loop.c
 *   the sides   guest: a new connection, HTTP/1, HTTP/2                       accept.c down1.c down2.c
 *               client of an ingress: a new connection, decisions             front.c
 *               host: dial, verify, keep; HTTP/1, HTTP/2                      pool.c up1.c up2.c
 *               what joins them, through struct side; carrying unread bytes   xchg.c splice.c
 *               credentials taken out of responses                            echo.c
 *               logins to databases: guest, host                              pgdown.c pgup.c mydown.c myup.c
 *               what they have in common                                      login.c
 *               what the HTTP/2 sides share; records of requests              h2.c audit.c
 *   tls         OpenSSL over a connection's buffers; certificate chains       tls.c chain.c
 *   io          buffers, sockets, timers                                      io.c
 *   below       pure or nearly so, usable alone: policy, bounds, rules,       policy.c bound.c access.c verdict.c
 *               verdicts on requests, signatures, leaves, heads, queries,     transform.c sigv4.c mint.c h1.c query.c
 *               client certificates, texts in a stream,                        identity.c scrub.c
 *               names, addresses;                                             hello.c host.c addr.c
 *               messages of Postgres and MySQL, their passwords;              pgwire.c scram.c mywire.c scramble.c
 *               routes and certificates of ingresses, what is forwarded       site.c certs.c forward.c
 *
 * Three kinds of calls point up: accept.c and front.c have the loop run a new connection, pool.c asks the engine for
 * addresses, and xchg.c for approvals.
 * `tests/egress/test_structure.py` holds this, and that includes have no cycle.
 *
 *   engine ── table of tenants (policy.h), reach, bounds, trust          shared, behind locks or atomic
 *     └─ loop: leaf cache, upstream pool, audit ring, counters
 *          └─ conn: one socket, DOWN (from a guest) or UP (to a host)
 *               └─ xchg: one request with its response, joins a DOWN and an UP
 *
 * Rules: a loop's data is touched by its thread only. Nothing blocks. A conn is freed only at the end of a round, so a
 * callee may kill any conn; callers look at `dead` afterwards. Writing only buffers; sockets are written by conn_flush.
 * Back-pressure: the reader asks for room on the other side first, and is woken by conn_again when room appears.
 */
#ifndef HYPEMAN_EGRESS_EGRESS_H
#define HYPEMAN_EGRESS_EGRESS_H

#include "forward.h"
#include "tls.h"

/* loop.c */
void *loop_main(void *loop);
void conn_run(struct conn *c);
void conn_lost(struct conn *c);    /* its socket is gone, or its time is over */
void conn_drained(struct conn *c); /* there is room again: wake who waits for it */

/* accept.c */
void accept_all(struct loop *l);
void down_run(struct conn *c);
void down_pass_ready(struct conn *c, struct conn *up);
void down_pass_failed(struct conn *c, enum reason why, const char *detail);
bool down_connect(struct conn *c, const struct head *h, size_t used);
void down_pass(struct conn *c); /* opens the connection that it is passed through to */

void socket_reset(int fd);  /* closing it will send RST */
void socket_refuse(int fd); /* closes it so */
bool socket_shed(struct loop *l, int listener);

/* front.c: ingresses */
struct hello;
void front_hello(struct conn *c, const struct hello *h);
void front_pass_failed(struct conn *c, enum reason why);
enum reason front_decide(struct xchg *x, const struct head *h, struct str *path, uint64_t *generation);
struct forwarded front_forwarded(const struct xchg *x, const struct head *h);
uint64_t front_generation(struct loop *l, const struct destination *to);
bool front_place(const struct conn *c, struct addr *address);          /* if it is known */
void front_remember(const struct conn *c, const struct addr *address); /* NULL: nobody answers there */
bool front_sweep(struct conn *c); /* ends exchanges of removed sites; whether there were any */
void visit_end(struct xchg *x);
void up_timer(struct conn *c); /* how long the host may be silent now */

/* down1.c */
void down1_run(struct conn *c);
/* down2.c */
bool down2_begin(struct conn *c);
void down2_run(struct conn *c);

/* up1.c */
void up1_run(struct conn *c);
void up1_send(struct xchg *x, const struct head *h, const struct request_line *line, const struct matched *m);
/* up2.c */
bool up2_begin(struct conn *c);
void up2_run(struct conn *c);
bool up2_send(struct xchg *x, const struct head *h, struct str path, bool body, const struct matched *m);

/* xchg.c: the joint. Down side of x: */
void xchg_begin(struct xchg *x, struct conn *down, const struct head *h);
bool xchg_count(struct xchg *x); /* False: its instance, or all, have too many streams */
void xchg_uncount(struct xchg *x);
void xchg_lost(struct conn *c); /* a side that carries one exchange: its client has gone */
void down_head(struct xchg *x, const struct head *h, enum body body, uint64_t length); /* also 1xx */
void down_data(struct xchg *x, const char *p, size_t n);
void down_end(struct xchg *x, const struct head *trailers);
void down_fail(struct xchg *x, enum reason why, const char *detail);
void down_pass_head(struct xchg *x, const struct head *h, enum body body, uint64_t length);
/* Up side of x: */
void up_data(struct xchg *x, const char *p, size_t n);
void up_end(struct xchg *x, const struct head *trailers);
void up_abandon(struct xchg *x);
void xchg_try_finish(struct xchg *x);
/* A guest's request by the rules of its instance. R_NONE, with those that apply in *m, borrowed from *s. */
enum reason xchg_decide(struct xchg *x, const struct head *h, struct str path, struct matched *m, struct snapshot **s,
                        uint64_t *generation);
void xchg_note_rules(struct xchg *x, struct snapshot *s, const struct matched *m); /* it is about to be sent by them */
/* Holds a request until new rules come, at most as long as the settings say; its head is decided again then. */
bool xchg_gather(struct xchg *x, const char *p, size_t n); /* a part of the body; false: too much, and refused */
/* Applies the rules to the body and completes `m`; what that needs is in `room`, to be wiped when the head is written. */
enum reason xchg_transform(struct xchg *x, const struct head *h, struct str path, struct matched *m, struct out *room);
void xchg_forget_body(struct xchg *x); /* what was gathered, and the head before it */
void xchg_hold(struct xchg *x, enum reason why);
bool xchg_ask(struct xchg *x, struct str path); /* holds it for an approval; false: too many are held */
void xchg_unask(struct xchg *x);
void held_decided(struct loop *l, uint64_t token, bool allow);
void held_again(struct loop *l, bool rules_changed); /* decide again, or refuse what was held too long */

/* echo.c: down_head, down_data and down_end where the response is searched for credentials */
void echo_begin(struct xchg *x, struct snapshot *s, const struct matched *m); /* nothing to search for: none of this */
void echo_head(struct xchg *x, const struct head *h, enum body body, uint64_t length);
void echo_data(struct xchg *x, const char *p, size_t n);
void echo_finish(struct xchg *x, const struct head *trailers);
void echo_end(struct xchg *x);

/* pool.c */
enum take { TAKE_READY, TAKE_WAIT, TAKE_FULL };
enum take up_take(struct xchg *x, uint64_t generation, bool want_h2, bool fresh);
void up_pass(struct conn *down);
void up_ready(struct conn *c);
void up_failed(struct conn *c, enum reason why, const char *detail);
void up_failed_one(struct conn *c, struct xchg *x, enum reason why, const char *detail);
void up_release(struct conn *c);
void up_run(struct conn *c);
void up_connected(struct conn *c);
void up_next_address(struct conn *c);
void up_answer(struct loop *l, uint64_t token, unsigned n, const struct addr *addresses);
void up_place(struct loop *l, uint64_t token, unsigned n, struct addr address, bool exists);
void up_sweep(struct loop *l);
void up_part(struct loop *l, const char *instance); /* which clients of ingresses were led to has ended */
void pool_remove(struct conn *c);

void up_begin_tls(struct conn *c);

/* pgdown.c, pgup.c */
void postgres_begin(struct conn *c); /* its first byte is there */
/* Before the handshake. False: logins to the host that is asked for are not ours. */
bool postgres_hello(struct conn *c, const struct host *name, bool named);
void postgres_run(struct conn *c);
void postgres_end(struct conn *c);
bool postgres_asks_for_tls(const struct conn *up); /* instead of beginning it at once */
void postgres_ask_for_tls(struct conn *up);
void postgres_tls_answer(struct conn *up);
void postgres_host_run(struct conn *up);
bool postgres_may_go_on(struct conn *c, const struct snapshot *s); /* under these rules */

/* mydown.c, myup.c */
bool mysql_waits(struct conn *c); /* it is a new connection to a port of MySQL, where the host speaks first */
void mysql_begin(struct conn *c); /* c->to.host: if it is known; else what the rules say */
void mysql_hello(struct conn *c, const struct host *name, bool named);
void mysql_run(struct conn *c);
void mysql_end(struct conn *c);
void mysql_host_run(struct conn *up);
bool mysql_may_go_on(struct conn *c, const struct snapshot *s);

/* splice.c */
void splice_begin(struct conn *down, struct conn *up);
void splice_run(struct conn *c);
void splice_unanswered(struct conn *down); /* the host has not begun to speak in time */
void tunnel_begin(struct conn *down, struct conn *up);
void tunnel_run(struct conn *c);

/* audit.c */
struct audit *audit_new(void);
void audit_free(struct audit *a);
void audit_record(struct loop *l, const struct tenant *t, const struct xchg *x);
void audit_refusal(struct conn *c, enum reason why);
void audit_tick(struct loop *l);
size_t audit_read(struct audit *a, char *out, size_t cap);

#endif
