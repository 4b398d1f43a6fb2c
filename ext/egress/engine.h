/* The interface of the data plane. Every call returns at once except engine_join. */
#ifndef HYPEMAN_EGRESS_ENGINE_H
#define HYPEMAN_EGRESS_ENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bound.h"

enum timer_class {
    T_HEAD, /* a request head must be complete */
    T_HANDSHAKE,
    T_RESOLVE,
    T_CONNECT,   /* per address */
    T_IDLE_DOWN, /* between requests */
    T_IDLE_UP,
    T_STREAM, /* no byte in either direction */
    T_HALF,   /* the same once one side has ended */
    T_LINGER,
    T_ASK,    /* a request that is held for an approval; not a connection's timer */
    T_HELD,   /* a request whose credential has no value at the moment; not a connection's timer */
    T_PLACE,  /* ingresses: the server says where an instance is */
    T_DIAL,   /* a guest accepts a connection; it may have to be woken first */
    T_ANSWER, /* a guest begins its response, and request and response make progress */
    T_CLASSES,
};

enum metric {
    M_ACCEPTED,
    M_UNREGISTERED,
    M_TOO_MANY,
    M_HANDSHAKES,
    M_HANDSHAKES_FAILED,
    M_MINTED,
    M_REQUESTS,
    M_INJECTED,
    M_DENIED,
    M_PASSED_THROUGH,
    M_TUNNELS,
    M_UPSTREAM_OPENED,
    M_UPSTREAM_REUSED,
    M_UPSTREAM_FAILED,
    M_VERIFY_FAILED,
    M_BYTES_UP,
    M_BYTES_DOWN,
    M_AUDIT_LOST,
    M_CONNECTIONS, /* gauge */
    M_STATUS_2XX,
    M_STATUS_3XX,
    M_STATUS_4XX,
    M_STATUS_5XX,
    M_CLIENTS, /* gauge: connections from clients of ingresses */
    M_CLIENTS_REFUSED,
    M_SCRUBBED,
    M_COUNT,
};

enum { LATENCY_BUCKETS = 24 }; /* bucket i: below 2^i · 16 µs */

struct engine_settings {
    unsigned loops;
    const int *listeners;                /* one listening socket per loop; taken over */
    const char *ca_certificate, *ca_key; /* PEM */
    const char *trusted, *trust_extra;   /* PEM: what upstream certificates must chain to; empty: none */
    unsigned leaf_cache;
    unsigned max_requests, max_mints;                           /* per instance; see struct limits */
    uint64_t bounds_each[B_WINDOWS], bounds_total[B_WINDOWS];   /* see bound.h */
    uint64_t clients_each[B_WINDOWS], clients_total[B_WINDOWS]; /* of one address, and of all, at ingresses */
    uint16_t listen_port;
    uint16_t assumed_tls_port; /* port meant by TLS that arrives without redirection */
    unsigned timers_ms[T_CLASSES];
    unsigned n_allow, n_deny;
    const char *const *allow; /* "address/prefix", IPv4 or IPv6 */
    const char *const *deny;
};

struct engine;

struct engine *engine_new(const struct engine_settings *s, char *error, size_t error_size);
bool engine_start(struct engine *e); /* connections queue up until engine_accept */
void engine_accept(struct engine *e);
void engine_drain(struct engine *e, unsigned grace_ms); /* no new connections; old ones get grace_ms */
unsigned engine_running(struct engine *e); /* loops that have not ended; engine_audit_fd says when one has */
void engine_join(struct engine *e);
void engine_free(struct engine *e);

int engine_set_policy(struct engine *e, const char *address, const char *instance, const uint8_t *snapshot, size_t n);
bool engine_remove(struct engine *e, const char *address);

/* Ingresses. The routes of one, instead of those before; false: they are malformed. */
bool engine_put_site(struct engine *e, const char *ingress, const uint8_t *data, size_t n);
bool engine_drop_site(struct engine *e, const char *ingress); /* ends its exchanges */
/* Takes over a listening socket, on which requests are for this port; false without memory. */
bool engine_listen(struct engine *e, int fd, uint16_t port);
void engine_unlisten(struct engine *e, uint16_t port);
/* The known address of this instance, or of all (NULL), is no longer valid. */
void engine_forget(struct engine *e, const char *instance);
/* The instance has ended: ends the exchanges with it, since no packet does. */
void engine_part(struct engine *e, const char *instance);

/* The certificate of a host name with its key, both in PEM; NULL: it has none. False: they do not belong together, or
 * cannot be read. */
bool engine_certify(struct engine *e, const char *name, const char *chain, const char *key);
/* What proves to a public CA that the name is ours; empty texts: nothing. False: as above, or too long. */
bool engine_challenge(struct engine *e, const char *name, const char *token, const char *proof, const char *chain,
                      const char *key);

/* Questions: engine_question_fd is readable while there are some. With a name, it is to be resolved for the instance;
 * without, the question is where the instance is. */
int engine_question_fd(struct engine *e);
bool engine_question(struct engine *e, unsigned *loop, uint64_t *token, char instance[64], char name[256]);
/* `addresses` as text; none: the name could not be resolved. */
void engine_answer(struct engine *e, unsigned loop, uint64_t token, unsigned n, const char *const *addresses);
/* `address` is empty if the instance cannot take requests. */
void engine_place(struct engine *e, unsigned loop, uint64_t token, const char *address, bool exists);

/* The same for requests that are held for an approval. */
struct approval {
    unsigned loop;
    uint64_t token;
    uint16_t port;
    bool tls;
    char instance[64], host[256], method[32], rule[64], path[256];
};
bool engine_approval(struct engine *e, struct approval *out);
void engine_decide(struct engine *e, unsigned loop, uint64_t token, bool allow);

int engine_audit_fd(struct engine *e);
/* Whole records of one loop, see audit.c for their layout; 0 when there are no more. */
size_t engine_audit_read(struct engine *e, char *out, size_t cap);

uint64_t engine_metric(struct engine *e, enum metric m);
uint64_t engine_in_use(struct engine *e, enum bound what);
/* The same of the instance that holds the most, and which one it is. */
uint64_t engine_largest(struct engine *e, enum bound what, char instance[INSTANCE_MAX]);
uint64_t engine_limited(struct engine *e, enum bound what); /* how often something was refused because of it */
uint64_t engine_denied(struct engine *e, unsigned reason);
uint64_t engine_latency(struct engine *e, unsigned bucket);
const char *engine_reason(unsigned reason); /* NULL beyond the last */

#endif
