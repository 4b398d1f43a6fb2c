/* Limits on what an instance, and all together, may hold at once. Shared by the loops, without locks. */
#ifndef HYPEMAN_EGRESS_BOUND_H
#define HYPEMAN_EGRESS_BOUND_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum bound {
    B_CONNECTIONS, /* from guests */
    B_UPSTREAMS,   /* connections to hosts, idle ones too */
    B_STREAMS,     /* requests that are not complete */
    B_HANDSHAKES,  /* TLS handshakes with guests that are not complete */
    B_DESCRIPTORS,
    B_BYTES,   /* in buffers; above it, a connection is read only when what it sent before has been passed on */
    B_WINDOWS, /* bytes that peers may send unasked in HTTP/2 beyond the protocol's default; bounded as B_BYTES */
    B_COUNT,
};

enum { INSTANCE_MAX = 64 }; /* bytes of an instance's id with the zero behind it */

struct usage {
    atomic_int_fast64_t used[B_COUNT];
};

struct bounds {
    int64_t each[B_COUNT], total[B_COUNT];
    struct usage usage; /* of all */
};

/* No instance gets more than half of all. B_WINDOWS is set from B_BYTES. */
void bounds_init(struct bounds *b, const uint64_t *each, const uint64_t *total);
/* Takes n for an instance and for all. False, and nothing is taken, if that exceeds a limit. */
bool bound_take(struct bounds *b, struct usage *one, enum bound what, int64_t n);
void bound_give(struct bounds *b, struct usage *one, enum bound what, int64_t n);

#endif
