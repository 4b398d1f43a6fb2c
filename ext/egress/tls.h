/* TLS over the buffers of a connection; see tls.c. */
#ifndef HYPEMAN_EGRESS_TLS_H
#define HYPEMAN_EGRESS_TLS_H

#include "io.h"

SSL_CTX *tls_server_context(void);
/* For the certificate and key in PEM; `acme`: it answers TLS-ALPN-01. NULL: they are none. */
SSL_CTX *tls_site_context(const char *chain_pem, const char *key_pem, bool acme);
void tls_refuse(struct conn *c, unsigned alert); /* instead of a handshake */
SSL_CTX *tls_client_context(const char *trusted_pem, const char *extra_pem, char *error, size_t n);
bool tls_begin(struct conn *c, SSL *ssl, bool server); /* takes over ssl */
int tls_handshake(struct conn *c);                     /* 1 done, 0 more, -1 failed */
const char *tls_alert_received(void); /* by the read that has just failed, in words; NULL: it was none */

#endif
