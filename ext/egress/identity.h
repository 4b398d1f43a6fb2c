/* The certificate that an instance presents to a host (mTLS): read from its policy for one handshake, so that no copy
 * of the key outlives it. */
#ifndef HYPEMAN_EGRESS_IDENTITY_H
#define HYPEMAN_EGRESS_IDENTITY_H

#include <openssl/ssl.h>

#include "policy.h"

/* The rule of kind RULE_MTLS for this host; NULL: it gets no certificate. */
const struct rule *identity_for(const struct snapshot *s, const struct host *h, uint16_t port);
/* Sets the rule's certificate, chain and key for a handshake. False: they cannot be used. */
bool identity_use(SSL *ssl, const struct rule *r);

#endif
