/* See identity.h. The server has checked certificate, chain and key (transforms.py); they arrive as base64 of DER, the
 * key as the rule's value, the certificates from the leaf on as its extra texts. */
#include "identity.h"

#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/x509.h>

const struct rule *identity_for(const struct snapshot *s, const struct host *h, uint16_t port)
{
    for (unsigned i = 0; i < s->n; i++)
        if (s->rules[i].kind == RULE_MTLS && rule_covers(&s->rules[i], h, port))
            return &s->rules[i];
    return NULL;
}

/* The bytes of a base64 text, to be wiped; NULL: it is none. */
static unsigned char *decode(struct str text, size_t *n)
{
    unsigned char *out = text.n && text.n % 4 == 0 ? OPENSSL_malloc(text.n) : NULL;
    int size = out ? EVP_DecodeBlock(out, (const unsigned char *)text.p, (int)text.n) : -1;
    if (size < 0) {
        OPENSSL_clear_free(out, text.n);
        return NULL;
    }
    *n = (size_t)size; /* with zeros for the padding, which the length in DER excludes */
    return out;
}

static bool use_key(SSL *ssl, struct str text)
{
    size_t n = 0;
    unsigned char *der = decode(text, &n);
    const unsigned char *p = der;
    EVP_PKEY *key = der ? d2i_AutoPrivateKey(NULL, &p, (long)n) : NULL;
    bool ok = key && SSL_use_PrivateKey(ssl, key) == 1;
    EVP_PKEY_free(key);
    OPENSSL_clear_free(der, text.n);
    return ok;
}

static bool use_certificate(SSL *ssl, struct str text, bool leaf)
{
    size_t n = 0;
    unsigned char *der = decode(text, &n);
    const unsigned char *p = der;
    X509 *x = der ? d2i_X509(NULL, &p, (long)n) : NULL;
    bool ok = x && (leaf ? SSL_use_certificate(ssl, x) : SSL_add1_chain_cert(ssl, x)) == 1;
    X509_free(x);
    OPENSSL_clear_free(der, text.n);
    return ok;
}

bool identity_use(SSL *ssl, const struct rule *r)
{
    bool ok = true;
    for (unsigned i = 0; ok && i < MAX_EXTRA && r->extra[i].n; i++)
        ok = use_certificate(ssl, r->extra[i], i == 0);
    ok = ok && use_key(ssl, r->value);
    ERR_clear_error();
    return ok;
}
