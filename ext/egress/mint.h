/* Leaf certificates for the names that guests ask for, signed by the host's CA.
 *
 * The subject alternative name is exactly the requested name: wider leaves would make browsers reuse one connection for
 * sibling hosts. One P-256 key serves all leaves of a loop. The cache is bounded, least recently used goes first.
 */
#ifndef HYPEMAN_EGRESS_MINT_H
#define HYPEMAN_EGRESS_MINT_H

#include <openssl/ssl.h>

#include "host.h"

struct mint;

/* `context` makes the server contexts that leaves are used with. */
struct mint *mint_new(const char *ca_certificate_pem, const char *ca_key_pem, unsigned capacity,
                      SSL_CTX *(*context)(void));
void mint_free(struct mint *m);
/* Whether a leaf for the name exists, so that using it costs no signature. */
bool mint_has(struct mint *m, const struct host *name, int64_t now_s);
/* A server session with the leaf for `name`, which is made if necessary; NULL on failure. */
SSL *mint_session(struct mint *m, const struct host *name, int64_t now_s);
uint64_t mint_count(const struct mint *m);

#endif
