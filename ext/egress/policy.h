/* What an instance may do and which headers it is given: snapshots, tenants and the table from source address to
 * tenant.
 *
 * A snapshot is immutable. A request borrows it only while its head is decided and written, and where the response is
 * searched for credentials until that is complete. So a replaced snapshot dies, and its secrets are wiped, with them. Its memory is locked and left
 * out of core dumps. The table is the one thing that several loops share; each call holds its lock for a look-up.
 */
#ifndef HYPEMAN_EGRESS_POLICY_H
#define HYPEMAN_EGRESS_POLICY_H

#include <pthread.h>
#include <stdatomic.h>

#include "access.h"
#include "addr.h"
#include "bound.h"
#include "h1.h"
#include "host.h"

enum { MAX_RULES = 256 };

/* What happens to a host that no rule names. */
enum unmatched { UNMATCHED_PASS, UNMATCHED_INSPECT, UNMATCHED_DENY };

struct pattern {
    struct str host;
    bool wildcard;
};

/* What a rule does with the credential; transform.c has those that need the request. Numbers as in hypeman/egress/policy.py. */
enum rule_kind {
    RULE_HEADER,   /* sets the field `name` to `value` */
    RULE_QUERY,    /* sets the parameter `name` of the query to `value`, both percent-encoded already */
    RULE_SIGV4,    /* signs with `value`, see sigv4.h; `name` is unused */
    RULE_HMAC,     /* sets the field `name` to a signature of the body by the key `value`; extra: the scheme */
    RULE_BODY,     /* puts the value in the place of the placeholder in the body; extra: as JSON, as a form */
    RULE_MTLS,     /* the key of the certificate that the host is shown; extra: the certificates, see identity.c */
    RULE_SCRUB,    /* what the host may echo, and the placeholder instead; extra: texts, see echo.c */
    RULE_POSTGRES, /* logs in to a server of Postgres with the password `value`; extra: enum login_extra */
    RULE_MYSQL,    /* the same for MySQL */
    RULE_KINDS,
};

enum login_extra {
    LOGIN_USER,
    LOGIN_DATABASE, /* empty: any; MySQL has no other */
    LOGIN_VERIFIER, /* Postgres: of the placeholder, see scram.h */
    LOGIN_METHOD,   /* the weakest way to authenticate that is accepted, see pgup.c and myup.c */
    LOGIN_PLAIN,    /* "plain": the connection to the server is not encrypted */
};

enum { MAX_EXTRA = 6 };

struct rule {
    struct str key;         /* name of the credential, as the guest and the audit know it */
    struct str placeholder; /* what the guest holds instead of the value */
    enum rule_kind kind;
    bool ready;        /* there is a value; else requests wait for one */
    int64_t expires_s; /* Unix time from which on there is none; 0: never */
    struct str name;   /* of the field, in lower case, or of the parameter */
    struct str value;  /* secret */
    struct str extra[MAX_EXTRA];
    bool every_host;
    unsigned n;
    const struct pattern *patterns;
    struct ports ports;
};

struct snapshot {
    atomic_uint refs;
    size_t size;            /* of the whole mapping */
    const uint8_t *encoded; /* what it was read from */
    size_t encoded_n;
    enum unmatched unmatched;
    bool greets;   /* it has rules for MySQL */
    bool web_only; /* HTTPS to tls_port and HTTP to 80 only, except where a rule names the port; TLS with a name only */
    uint16_t tls_port;
    unsigned n;
    struct rule *rules;
    enum private private;
    struct access *access; /* where the instance may go; NULL: anywhere */
};

/* Reads the encoding written by hypeman/egress/policy.py; NULL with errno set if it is not one. */
struct snapshot *snapshot_decode(const uint8_t *data, size_t n);
void snapshot_hold(struct snapshot *s);
void snapshot_release(struct snapshot *s);
bool snapshot_covers(const struct snapshot *s, const struct host *h, uint16_t port);
bool snapshot_allows_port(const struct snapshot *s, const struct host *h, uint16_t port, bool tls, int64_t now_s);
bool rule_covers(const struct rule *r, const struct host *h, uint16_t port);
/* Logins to databases: rules of RULE_POSTGRES or RULE_MYSQL. The rule for one; NULL: there is none. */
const struct rule *snapshot_login(const struct snapshot *s, enum rule_kind kind, const struct host *h, uint16_t port,
                                  struct str user, struct str database);
/* The one host that logins at the port can be for, as the user unless that is NULL; NULL: there is none, or several. */
const struct pattern *snapshot_login_host(const struct snapshot *s, enum rule_kind kind, uint16_t port,
                                          const char *user);
bool snapshot_logs_in(const struct snapshot *s, enum rule_kind kind, const struct host *h, uint16_t port);
bool rule_is_login(const struct rule *r);
bool snapshot_is_login(const struct snapshot *s, const struct host *h, uint16_t port); /* of any kind, as some user */
bool snapshot_greets(const struct snapshot *s, uint16_t port); /* who connects there waits for the server to speak */
bool rule_is_ready(const struct rule *r, int64_t now_s);       /* it has a value that has not expired */

/* Tokens refilled with time; guarded by the owner's lock. A rate of 0 never refuses. */
struct bucket {
    double level;
    int64_t at_us;
};

/* Who connections, buffers and requests are charged to: an instance, or the clients of ingresses at one address. */
struct tenant {
    atomic_uint refs;
    uint64_t id;
    char instance[INSTANCE_MAX];
    struct addr source;
    atomic_bool removed;
    struct bounds *bounds;
    struct usage usage;
    atomic_uint asking;       /* requests that are held for an approval */
    struct table *clients;    /* of a client: where it is as long as anything holds it; NULL: an instance */
    pthread_mutex_t lock;     /* of the fields below */
    struct session *sessions; /* of Postgres, see postgres.h */
    struct snapshot *snapshot;
    atomic_uint_fast64_t generation;
    struct bucket requests, mints;
    struct tenant *next;
};

struct limits {
    unsigned requests; /* per second and instance; 0: no limit */
    unsigned mints;    /* per second and instance */
};

struct table {
    pthread_mutex_t lock;
    struct tenant *slots[256];
    uint64_t last_id;
    struct limits limits;
    struct bounds bounds;
};

void table_init(struct table *t, struct limits limits);
void table_destroy(struct table *t);
/* Takes over the snapshot. An address given to another instance makes that one's tenant a removed one. The same rules as
 * before change nothing, so that upstream connections stay usable. */
int table_set(struct table *t, struct addr source, const char *instance, struct snapshot *s);
bool table_remove(struct table *t, struct addr source);
/* How much the instance with the most of it holds, and which one that is; 0 and "": nobody holds any. */
int64_t table_largest(struct table *table, enum bound what, char instance[INSTANCE_MAX]);
/* NULL: nobody we know. To be released. */
struct tenant *table_enter(struct table *t, struct addr source);
/* The tenant for a client at this address (of IPv6: in its network of 64 bits). To be released. NULL: no memory. */
struct tenant *table_client(struct table *t, struct addr source);
void tenant_hold(struct tenant *t);
void tenant_release(struct tenant *t);

/* The snapshot of this moment and its generation; to be released. NULL once the tenant is removed. */
struct snapshot *tenant_borrow(struct tenant *t, uint64_t *generation);
bool tenant_may_request(struct tenant *t, const struct limits *l, int64_t now_us);
bool tenant_may_mint(struct tenant *t, const struct limits *l, int64_t now_us);

#endif
