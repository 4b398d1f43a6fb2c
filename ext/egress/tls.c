/* OpenSSL without sockets: a BIO that reads from the connection's socket (or first from bytes already taken off it) and
 * writes into its buffer. So SSL_write never blocks, and one send carries many records.
 *
 * AES-128 with SHA-256 is preferred, as browsers do: processors have instructions for both, not for SHA-384, of which a
 * handshake computes some fifty.
 *
 * Session tickets are off on the guest's side: two tickets cost 55 µs of a 350 µs handshake, and what runs in guests
 * (a curl per call, short scripts) does not resume.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

#include "chain.h"
#include "tls.h"

static int bio_read(BIO *b, char *p, int n)
{
    struct conn *c = BIO_get_data(b);
    BIO_clear_retry_flags(b);
    size_t early = buf_size(&c->prefix);
    if (early) {
        size_t k = early < (size_t)n ? early : (size_t)n;
        memcpy(p, c->prefix.p + c->prefix.off, k);
        buf_take(c->loop, &c->prefix, k);
        return (int)k;
    }
    if (c->sock_eof)
        return 0;
    if (c->drained && !c->readable_end) {
        BIO_set_retry_read(b);
        return -1;
    }
    ssize_t got;
    do
        got = recv(c->fd, p, (size_t)n, 0);
    while (got < 0 && errno == EINTR);
    if (got > 0) {
        c->drained = got < n;
        return (int)got;
    }
    if (got == 0) {
        c->sock_eof = true;
        return 0;
    }
    if (errno == EAGAIN) {
        c->drained = true;
        BIO_set_retry_read(b);
    }
    return -1;
}

static int bio_write(BIO *b, const char *p, int n)
{
    struct conn *c = BIO_get_data(b);
    BIO_clear_retry_flags(b);
    buf_add(c->loop, &c->out, p, (size_t)n);
    conn_mark(c);
    return n;
}

static long bio_ctrl(BIO *b, int command, long number, void *pointer)
{
    struct conn *c = BIO_get_data(b);
    (void)number;
    (void)pointer;
    switch (command) {
    case BIO_CTRL_FLUSH:
        return 1;
    case BIO_CTRL_EOF:
        return c && c->sock_eof;
    default:
        return 0;
    }
}

static BIO_METHOD *method;
static pthread_once_t method_once = PTHREAD_ONCE_INIT;

static void make_method(void)
{
    method = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "hypeman connection");
    if (method) {
        BIO_meth_set_read(method, bio_read);
        BIO_meth_set_write(method, bio_write);
        BIO_meth_set_ctrl(method, bio_ctrl);
    }
}

#define ALPN_POSTGRES "\012postgresql"

static int choose_alpn(SSL *ssl, const unsigned char **out, unsigned char *n, const unsigned char *in, unsigned in_n,
                       void *arg)
{
    static const unsigned char OURS[] = "\2h2\10http/1.1", OTHER_WAY[] = "\10http/1.1\2h2";
    const struct conn *c = BIO_get_data(SSL_get_rbio(ssl));
    static const unsigned char POSTGRES[] = ALPN_POSTGRES;
    const unsigned char *order = c->to.postgres ? POSTGRES : c->prefers_h1 ? OTHER_WAY : OURS;
    unsigned size = c->to.postgres ? sizeof POSTGRES - 1 : sizeof OURS - 1;
    unsigned char *chosen;
    (void)arg;
    if (c->to.mysql)
        return SSL_TLSEXT_ERR_NOACK; /* it has no name there */
    if (SSL_select_next_proto(&chosen, n, order, size, in, in_n) != OPENSSL_NPN_NEGOTIATED)
        return SSL_TLSEXT_ERR_ALERT_FATAL;
    *out = chosen;
    return SSL_TLSEXT_ERR_OK;
}

static SSL_CTX *context(const SSL_METHOD *m)
{
    SSL_CTX *ctx = SSL_CTX_new(m);
    if (!ctx)
        return NULL;
    SSL_CTX_set_min_proto_version(ctx, TLS1_2_VERSION);
    SSL_CTX_set_options(
        ctx, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION | SSL_OP_NO_TICKET | SSL_OP_CIPHER_SERVER_PREFERENCE);
    SSL_CTX_set_ciphersuites(ctx, "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256");
    /* Post-quantum first where this OpenSSL has it (3.5); else its own list. */
    if (SSL_CTX_set1_groups_list(ctx, "X25519MLKEM768:X25519:P-256:P-384:P-521") != 1)
        ERR_clear_error();
    SSL_CTX_set_mode(ctx, SSL_MODE_RELEASE_BUFFERS | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_CTX_set_session_cache_mode(ctx, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_read_ahead(ctx, 1);
    SSL_CTX_set_default_read_buffer_len(ctx, WATERMARK + 4096);
    return ctx;
}

SSL_CTX *tls_server_context(void)
{
    SSL_CTX *ctx = context(TLS_server_method());
    if (ctx) {
        SSL_CTX_set_num_tickets(ctx, 0);
        SSL_CTX_set_alpn_select_cb(ctx, choose_alpn, NULL);
    }
    return ctx;
}

static int choose_acme(SSL *ssl, const unsigned char **out, unsigned char *n, const unsigned char *in, unsigned in_n,
                       void *arg)
{
    static const unsigned char ACME[] = "acme-tls/1";
    (void)ssl, (void)in, (void)in_n, (void)arg; /* chosen because it is the only one offered, see hello.c */
    *out = ACME;
    *n = sizeof ACME - 1;
    return SSL_TLSEXT_ERR_OK;
}

static bool use_chain(SSL_CTX *ctx, const char *pem)
{
    BIO *b = BIO_new_mem_buf(pem, -1);
    X509 *leaf = b ? PEM_read_bio_X509_AUX(b, NULL, NULL, NULL) : NULL, *next = NULL;
    bool ok = leaf && SSL_CTX_use_certificate(ctx, leaf) == 1;
    while (ok && (next = PEM_read_bio_X509(b, NULL, NULL, NULL))) {
        ok = SSL_CTX_add0_chain_cert(ctx, next) == 1; /* takes it over */
        if (!ok)
            X509_free(next);
    }
    X509_free(leaf);
    BIO_free(b);
    return ok;
}

static bool use_key(SSL_CTX *ctx, const char *pem)
{
    BIO *b = BIO_new_mem_buf(pem, -1);
    EVP_PKEY *key = b ? PEM_read_bio_PrivateKey(b, NULL, NULL, NULL) : NULL;
    bool ok = key && SSL_CTX_use_PrivateKey(ctx, key) == 1 && SSL_CTX_check_private_key(ctx) == 1;
    EVP_PKEY_free(key);
    BIO_free(b);
    return ok;
}

SSL_CTX *tls_site_context(const char *chain, const char *key, bool acme)
{
    SSL_CTX *ctx = tls_server_context();
    bool ok = ctx && SSL_CTX_set_cipher_list(ctx, "ECDHE+AESGCM:ECDHE+CHACHA20") == 1 && use_chain(ctx, chain)
        && use_key(ctx, key);
    ERR_clear_error();
    if (ok && acme)
        SSL_CTX_set_alpn_select_cb(ctx, choose_acme, NULL);
    if (ok)
        return ctx;
    SSL_CTX_free(ctx);
    return NULL;
}

void tls_refuse(struct conn *c, unsigned alert)
{
    const char record[] = {0x15, 3, 3, 0, 2, 2, (char)alert}; /* fatal; nothing is encrypted yet */
    conn_write(c, record, sizeof record);
    conn_finish(c, true);
}

static bool add_pem(SSL_CTX *ctx, const char *pem)
{
    BIO *b = BIO_new_mem_buf(pem, -1);
    X509_STORE *store = SSL_CTX_get_cert_store(ctx);
    X509 *x;
    unsigned n = 0;
    while (b && (x = PEM_read_bio_X509(b, NULL, NULL, NULL))) {
        n += X509_STORE_add_cert(store, x) == 1;
        X509_free(x);
    }
    BIO_free(b);
    ERR_clear_error();
    return n > 0;
}

SSL_CTX *tls_client_context(const char *trusted, const char *extra, char *error, size_t n)
{
    SSL_CTX *ctx = context(TLS_client_method());
    if (!ctx) {
        (void)snprintf(error, n, "no TLS client context");
        return NULL;
    }
    if ((*trusted && !add_pem(ctx, trusted)) || (*extra && !add_pem(ctx, extra))) {
        (void)snprintf(error, n, "the trusted certificates hold none that can be read");
        SSL_CTX_free(ctx);
        return NULL;
    }
    SSL_CTX_set_verify(ctx, SSL_VERIFY_PEER, NULL);
    SSL_CTX_set_cert_verify_callback(ctx, chain_verify, NULL);
    /* A certificate that the operator trusts is trusted, an intermediate too, as in Go. */
    X509_VERIFY_PARAM_set_flags(SSL_CTX_get0_param(ctx),
                                X509_V_FLAG_TRUSTED_FIRST | X509_V_FLAG_PARTIAL_CHAIN | X509_V_FLAG_X509_STRICT);
    X509_VERIFY_PARAM_set_auth_level(SSL_CTX_get0_param(ctx), 2); /* keys of 112 bits, no SHA-1 */
    return ctx;
}

bool tls_begin(struct conn *c, SSL *ssl, bool server)
{
    (void)pthread_once(&method_once, make_method);
    BIO *b = method ? BIO_new(method) : NULL;
    c->ssl = ssl;
    if (!b || !c->ssl) {
        BIO_free(b);
        return false;
    }
    BIO_set_data(b, c);
    BIO_set_init(b, 1);
    SSL_set_bio(c->ssl, b, b);
    c->phase = P_HANDSHAKE;
    if (server) {
        SSL_set_accept_state(c->ssl);
        return true;
    }
    SSL_set_connect_state(c->ssl);
    static const char BOTH[] = "\2h2\10http/1.1", ONE[] = "\10http/1.1", POSTGRES[] = ALPN_POSTGRES;
    const char *alpn = c->to.postgres ? POSTGRES : c->want_h2 ? BOTH : ONE;
    if (!c->to.mysql)
        SSL_set_alpn_protos(c->ssl, (const unsigned char *)alpn, (unsigned)strlen(alpn));
    SSL_set_hostflags(c->ssl, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS | X509_CHECK_FLAG_NEVER_CHECK_SUBJECT);
    if (c->to.host.kind == HOST_NAME)
        return SSL_set_tlsext_host_name(c->ssl, c->to.host.text) == 1 && SSL_set1_host(c->ssl, c->to.host.text) == 1;
    return X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(c->ssl), c->to.host.text) == 1;
}

int tls_handshake(struct conn *c)
{
    ERR_clear_error();
    int r = SSL_do_handshake(c->ssl);
    if (r == 1)
        return 1;
    int e = SSL_get_error(c->ssl, r);
    conn_mark(c);
    if (e == SSL_ERROR_WANT_READ || e == SSL_ERROR_WANT_WRITE)
        return 0;
    conn_alert(c);
    return -1;
}

const char *tls_alert_received(void)
{
    unsigned long e = ERR_peek_error();
    return ERR_GET_LIB(e) == ERR_LIB_SSL && ERR_GET_REASON(e) > SSL_AD_REASON_OFFSET ? ERR_reason_error_string(e)
                                                                                     : NULL;
}
