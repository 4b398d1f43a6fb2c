/* Messages of the Postgres protocol 3 up to the end of authentication: read with bounds, and written. Pure.
 *
 * A client's first message has no type; the others are a type, a length that counts itself, and a body. What a parser
 * returns points into the caller's buffer. https://www.postgresql.org/docs/current/protocol-message-formats.html
 */
#ifndef HYPEMAN_EGRESS_PGWIRE_H
#define HYPEMAN_EGRESS_PGWIRE_H

#include "verdict.h"

enum {
    PG_STARTUP_MAX = 10004, /* as the server's MAX_STARTUP_PACKET_LENGTH, and the length itself */
    PG_PARAMETERS = 64,
    PG_NAME_MAX = 64, /* NAMEDATALEN: the server cuts longer names of roles and databases */
    PG_MESSAGE_MAX = 30000,
    PG_VERSION_3_0 = 3 << 16,
};

enum pg_read { PG_BAD = -1, PG_MORE, PG_OK };

struct pg_startup {
    enum { PG_STARTUP, PG_WANTS_TLS, PG_WANTS_GSS, PG_CANCEL, PG_OTHER_VERSION } kind;
    size_t size;               /* bytes of the message */
    uint32_t version;          /* PG_STARTUP */
    uint32_t process, secret;  /* PG_CANCEL */
    struct str user, database; /* as the server takes them: none is the one named like the role; physical replication
                                * is in none, so that it is empty */
    bool physical;             /* it asks for physical replication, or says that it does not want to replicate */
    unsigned n;                /* the other parameters, without those of the protocol ("_pq_.") */
    struct str name[PG_PARAMETERS], value[PG_PARAMETERS];
    unsigned options; /* of the protocol, none of which is known here */
    struct str option[PG_PARAMETERS];
};

/* The first message of a client. A parameter that decides something is in it at most once. */
enum pg_read pg_read_startup(const char *p, size_t n, struct pg_startup *out);

struct pg_message {
    char type;
    size_t size; /* with type and length */
    struct str body;
};

enum pg_read pg_read_message(const char *p, size_t n, size_t most, struct pg_message *out);

/* Bodies of server messages of type 'R'. */
enum pg_authentication {
    PG_AUTH_OK = 0,
    PG_AUTH_CLEARTEXT = 3,
    PG_AUTH_MD5 = 5,            /* and a salt of four bytes */
    PG_AUTH_SASL = 10,          /* and mechanisms */
    PG_AUTH_SASL_CONTINUE = 11, /* and data */
    PG_AUTH_SASL_FINAL = 12,
};

/* False: it is too short for any. */
bool pg_read_authentication(struct str body, uint32_t *kind, struct str *rest);
/* Whether a list of mechanisms has one; false also if it is no such list. */
bool pg_offers(struct str mechanisms, const char *name);
/* Of a client's SASLInitialResponse. */
bool pg_read_sasl_initial(struct str body, struct str *mechanism, struct str *data);
/* The field of an ErrorResponse or a NoticeResponse; empty if it has none. */
struct str pg_error_field(struct str body, char field);
/* Of BackendKeyData, as protocol 3.0 has it. */
bool pg_read_key(struct str body, uint32_t *process, uint32_t *secret);

void pg_write_request(struct out *o, uint32_t code); /* SSLRequest and the like */
void pg_write_cancel(struct out *o, uint32_t process, uint32_t secret);
void pg_write_startup(struct out *o, const struct pg_startup *s); /* in version 3.0 */
void pg_write_negotiation(struct out *o, const struct pg_startup *s);
void pg_write(struct out *o, char type, struct str body);
void pg_write_authentication(struct out *o, uint32_t kind, struct str rest);
void pg_write_sasl_initial(struct out *o, const char *mechanism, struct str data);
/* An ErrorResponse of severity FATAL. No detail or hint: without that field. */
void pg_write_error(struct out *o, const char *sqlstate, const char *message, const char *detail, const char *hint);

enum { PG_SSL_REQUEST = 80877103, PG_GSS_REQUEST = 80877104, PG_CANCEL_REQUEST = 80877102 };

#endif
