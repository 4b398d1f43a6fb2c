/* What the two sides of a login to Postgres share; see pgdown.c. */
#ifndef HYPEMAN_EGRESS_POSTGRES_H
#define HYPEMAN_EGRESS_POSTGRES_H

#include "login.h"
#include "pgwire.h"
#include "scram.h"

/* A session that can be cancelled. In its tenant's list, guarded by that one's lock. */
struct session {
    struct session *prev, *next;
    bool listed;
    uint32_t process, secret;
    struct destination to;
};

enum stage { S_FIRST, S_STARTUP, S_SASL, S_PROOF, S_HOST };
enum host_stage { H_NEW, H_ASKED, H_SCRAM, H_DERIVE, H_FINAL, H_KNOWN, H_READY, H_CANCELLED };

struct postgres {
    enum stage stage;
    enum host_stage host;
    bool direct; /* its TLS began at once */
    bool asked_for_gss, cancels;
    uint32_t process, secret; /* which session it cancels */
    struct str startup;       /* for the host; allocated */
    struct login login;
    struct scram_verifier verifier;
    struct scram_server guest;
    size_t heard; /* bytes of the host; what it says before the guest may speak is bounded by nothing else */
    struct scram_client *client; /* locked memory */
    size_t client_size;
    struct session session;
};

/* pgdown.c */
enum reason pg_decide(struct conn *c, uint64_t *generation); /* R_APPROVAL_PENDING, R_CREDENTIAL: not yet */
void pg_list_session(struct conn *c);
void pg_forget_client(struct postgres *pg);
/* pgup.c */
void pg_begin_host(struct conn *up);

#endif
