/* Certificates of ingresses by host name, and the answers for names that a public CA validates. Shared by the loops.
 *
 * A hello for a name is answered with the certificate of just this name or else of "*." and its parent. Connections
 * keep the one they began with when it is replaced.
 */
#ifndef HYPEMAN_EGRESS_CERTS_H
#define HYPEMAN_EGRESS_CERTS_H

#include <openssl/ssl.h>
#include <pthread.h>

#include "host.h"

enum { CERT_SLOTS = 1024, TOKEN_MAX = 256, PROOF_MAX = 600 };

struct cert;

struct certs {
    pthread_mutex_t lock;
    struct cert *slots[CERT_SLOTS];
};

void certs_init(struct certs *c);
void certs_destroy(struct certs *c);
/* Takes over the context; NULL: the name has no certificate. False without memory. */
bool certs_put(struct certs *c, const char *name, SSL_CTX *ctx);
/* The same for a name that is validated: HTTP-01's token with its answer, and the context for TLS-ALPN-01; empty and
 * NULL: none. */
bool certs_challenge(struct certs *c, const char *name, const char *token, const char *proof, SSL_CTX *ctx);

/* A new session, or NULL. `challenge`: the one for TLS-ALPN-01. */
SSL *certs_session(struct certs *c, const struct host *name, bool challenge);
/* The answer to HTTP-01, if there is one for the token. */
bool certs_proof(struct certs *c, const struct host *name, const char *token, size_t n, char proof[PROOF_MAX]);

#endif
