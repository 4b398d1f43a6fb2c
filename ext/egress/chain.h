/* Which chain of certificates is valid for a host's name. OpenSSL follows one path and gives up where it ends; hosts
 * send cross signs, old roots and expired intermediates beside good ones, and Go and browsers try them all. So do we,
 * within bounds.
 *
 * Called by OpenSSL in the handshake (SSL_CTX_set_cert_verify_callback); touches nothing but its argument.
 */
#ifndef HYPEMAN_EGRESS_CHAIN_H
#define HYPEMAN_EGRESS_CHAIN_H

#include <openssl/x509_vfy.h>

int chain_verify(X509_STORE_CTX *ctx, void *unused);

#endif
