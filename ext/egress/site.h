/* Ingresses: which instance is meant by a host name on a port, and what a client must show. Pure.
 *
 * Host names may have captures: {name} stands for one whole label. Labels are compared from the right, and one that is
 * written out wins over a capture: a.example.com, then {x}.example.com, then a.{y}.com. Each pattern has a mask of the
 * labels that are captures, the rightmost label in its highest bit, so the pattern with the smallest mask wins. A
 * look-up tries each mask in use: one or two in practice, however many routes there are.
 *
 * The table is shared by the loops. A site (all routes of an ingress) is immutable and lives as long as a request uses
 * it; its memory holds the values of required headers, so it is locked and wiped as a snapshot is.
 */
#ifndef HYPEMAN_EGRESS_SITE_H
#define HYPEMAN_EGRESS_SITE_H

#include <pthread.h>
#include <stdatomic.h>

#include "h1.h"
#include "host.h"

enum { MAX_ROUTES = 256, SITE_SLOTS = 4096, SITE_ID_MAX = 64, INSTANCE_NAME_MAX = 64, MAX_SHAPES = 256 };

struct route {
    struct site *site;
    struct str hostname;      /* as the rule writes it: lower case apart from names of captures */
    struct str target;        /* an instance's name, or a text with captures */
    struct str header, value; /* which the client must send; empty: none */
    uint16_t port, target_port;
    uint16_t redirect; /* plain requests are sent to https on this port; 0: they are not */
    bool tls;          /* requests over TLS are for it, plain ones are not; else the other way round */
    bool pass;         /* TLS for it is not opened but carried to the instance; plain requests are not for it */
    uint64_t mask;
    uint8_t labels;
    bool captured;      /* the target depends on the host name */
    struct route *next; /* in its slot */
};

struct site {
    atomic_uint refs;
    atomic_bool removed;
    size_t size; /* of the whole mapping */
    const uint8_t *encoded;
    size_t encoded_n;
    char ingress[SITE_ID_MAX];
    unsigned n;
    struct route *routes;
    struct site *next; /* in its slot */
};

struct sites {
    pthread_mutex_t lock;
    struct route *routes[SITE_SLOTS];
    struct site *by_id[SITE_SLOTS];
    struct {
        uint64_t mask;
        uint8_t labels;
        unsigned routes;  /* that have this shape */
    } shapes[MAX_SHAPES]; /* the winning one first */
    unsigned n_shapes;
};

void sites_init(struct sites *s);
void sites_destroy(struct sites *s);
/* Replaces the routes of an ingress; reads the encoding written by hypeman/ingress/routing.py. The same ones as before
 * change nothing. False, and nothing changed, if it is no such encoding. */
bool sites_put(struct sites *s, const char *ingress, const uint8_t *data, size_t n);
bool sites_drop(struct sites *s, const char *ingress);
/* The route for a host name, whose site is to be released, with the target's name; NULL if there is none. */
const struct route *sites_find(struct sites *s, const struct host *host, uint16_t port, char target[INSTANCE_NAME_MAX]);
void site_release(struct site *s);
/* The client's head has the required header exactly once, with the right value, compared in constant time. */
bool route_admits(const struct route *r, const struct head *h);

#endif
