/* See mint.h. A first visit costs 0.29 ms, most of it the signature (OpenSSL 3.0).
 *
 * A context of its own costs a leaf 12 KB and 0.14 ms more, but saves each later connection 15 µs of putting
 * certificate and key into the session. So the second visit makes it: names seen once stay cheap, and so do busy ones.
 * */
#include "mint.h"

#include <arpa/inet.h>
#include <openssl/ec.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/x509v3.h>
#include <stdlib.h>
#include <string.h>

enum { SLOTS = 1024, LIFETIME_S = 24 * 3600, BACKDATED_S = 3600, RENEW_S = 3600 };

struct leaf {
    struct host name;
    int64_t expires_s;
    X509 *certificate;
    SSL_CTX *context; /* from the second visit on */
    struct leaf *in_slot;
    struct leaf *older, *newer;
};

struct mint {
    X509 *ca;
    EVP_PKEY *ca_key, *leaf_key;
    SSL_CTX *(*make_context)(void);
    SSL_CTX *context; /* without a certificate, for first visits */
    unsigned n, capacity;
    uint64_t made;
    struct leaf *slots[SLOTS];
    struct leaf *oldest, *newest;
};

struct mint *mint_new(const char *certificate, const char *key, unsigned capacity, SSL_CTX *(*context)(void))
{
    struct mint *m = calloc(1, sizeof *m);
    BIO *a = BIO_new_mem_buf(certificate, -1), *b = BIO_new_mem_buf(key, -1);
    if (m && a && b) {
        m->capacity = capacity;
        m->ca = PEM_read_bio_X509(a, NULL, NULL, NULL);
        m->ca_key = PEM_read_bio_PrivateKey(b, NULL, NULL, NULL);
        m->leaf_key = EVP_EC_gen("P-256");
        m->make_context = context;
        m->context = context();
    }
    BIO_free(a);
    BIO_free(b);
    if (m && m->ca && m->ca_key && m->leaf_key && m->context && X509_check_private_key(m->ca, m->ca_key) == 1)
        return m;
    mint_free(m);
    return NULL;
}

static struct leaf **slot_of(struct mint *m, const struct host *name)
{
    unsigned h = 5381;
    for (unsigned i = 0; i < name->len; i++)
        h = h * 33 + (unsigned char)name->text[i];
    struct leaf **at = &m->slots[h % SLOTS];
    while (*at && ((*at)->name.len != name->len || memcmp((*at)->name.text, name->text, name->len) != 0))
        at = &(*at)->in_slot;
    return at;
}

static void unlink_age(struct mint *m, struct leaf *l)
{
    *(l->older ? &l->older->newer : &m->oldest) = l->newer;
    *(l->newer ? &l->newer->older : &m->newest) = l->older;
}

static void link_newest(struct mint *m, struct leaf *l)
{
    l->older = m->newest;
    l->newer = NULL;
    *(m->newest ? &m->newest->newer : &m->oldest) = l;
    m->newest = l;
}

static void drop(struct mint *m, struct leaf **at)
{
    struct leaf *l = *at;
    *at = l->in_slot;
    unlink_age(m, l);
    X509_free(l->certificate);
    SSL_CTX_free(l->context);
    free(l);
    m->n--;
}

void mint_free(struct mint *m)
{
    if (!m)
        return;
    while (m->oldest)
        drop(m, slot_of(m, &m->oldest->name));
    X509_free(m->ca);
    EVP_PKEY_free(m->ca_key);
    EVP_PKEY_free(m->leaf_key);
    SSL_CTX_free(m->context);
    free(m);
}

static bool add_extension(X509 *x, X509 *issuer, int nid, const char *value)
{
    X509V3_CTX ctx;
    X509V3_set_ctx(&ctx, issuer, x, NULL, NULL, 0);
    X509_EXTENSION *e = X509V3_EXT_conf_nid(NULL, &ctx, nid, value);
    bool ok = e && X509_add_ext(x, e, -1) == 1;
    X509_EXTENSION_free(e);
    return ok;
}

/* Built from structures, not from text, so that no name can smuggle in a second one. */
static bool add_name(X509 *x, const struct host *name)
{
    GENERAL_NAMES *names = GENERAL_NAMES_new();
    GENERAL_NAME *general = GENERAL_NAME_new();
    bool ok = false;
    if (names && general && name->kind == HOST_NAME) {
        ASN1_IA5STRING *text = ASN1_IA5STRING_new();
        if (text && ASN1_STRING_set(text, name->text, name->len) == 1) {
            GENERAL_NAME_set0_value(general, GEN_DNS, text);
            ok = true;
        } else {
            ASN1_IA5STRING_free(text);
        }
    } else if (names && general) {
        ASN1_OCTET_STRING *octets = a2i_IPADDRESS(name->text);
        if (octets) {
            GENERAL_NAME_set0_value(general, GEN_IPADD, octets);
            ok = true;
        }
    }
    if (ok && sk_GENERAL_NAME_push(names, general) > 0)
        general = NULL;
    else
        ok = false;
    ok = ok && X509_add1_ext_i2d(x, NID_subject_alt_name, names, 0, 0) == 1;
    GENERAL_NAME_free(general);
    GENERAL_NAMES_free(names);
    return ok;
}

static X509 *make(struct mint *m, const struct host *name, int64_t now_s)
{
    X509 *x = X509_new();
    BIGNUM *serial = BN_new();
    bool ok = x && serial && X509_set_version(x, X509_VERSION_3) && BN_rand(serial, 127, BN_RAND_TOP_ONE, 0)
        && BN_to_ASN1_INTEGER(serial, X509_get_serialNumber(x))
        && ASN1_TIME_set(X509_getm_notBefore(x), (time_t)(now_s - BACKDATED_S))
        && ASN1_TIME_set(X509_getm_notAfter(x), (time_t)(now_s + LIFETIME_S))
        && X509_set_issuer_name(x, X509_get_subject_name(m->ca)) && X509_set_pubkey(x, m->leaf_key)
        && X509_NAME_add_entry_by_NID(X509_get_subject_name(x), NID_organizationName, MBSTRING_ASC,
                                      (const unsigned char *)"hypeman egress", -1, -1, 0)
        && add_name(x, name) && add_extension(x, m->ca, NID_basic_constraints, "critical,CA:FALSE")
        && add_extension(x, m->ca, NID_key_usage, "critical,digitalSignature")
        && add_extension(x, m->ca, NID_ext_key_usage, "serverAuth")
        && add_extension(x, m->ca, NID_authority_key_identifier, "keyid:always")
        && X509_sign(x, m->ca_key, EVP_sha256()) > 0;
    BN_free(serial);
    if (!ok) {
        X509_free(x);
        ERR_clear_error();
        return NULL;
    }
    m->made++;
    return x;
}

bool mint_has(struct mint *m, const struct host *name, int64_t now_s)
{
    struct leaf *l = *slot_of(m, name);
    return l && l->expires_s - RENEW_S > now_s;
}

static SSL *first_session(struct mint *m, struct leaf *l)
{
    SSL *ssl = SSL_new(m->context);
    if (ssl && SSL_use_cert_and_key(ssl, l->certificate, m->leaf_key, NULL, 1) == 1)
        return ssl;
    SSL_free(ssl);
    return NULL;
}

static SSL *later_session(struct mint *m, struct leaf *l)
{
    if (!l->context) {
        SSL_CTX *made = m->make_context();
        if (!made || SSL_CTX_use_cert_and_key(made, l->certificate, m->leaf_key, NULL, 1) != 1) {
            SSL_CTX_free(made);
            return first_session(m, l);
        }
        l->context = made;
    }
    return SSL_new(l->context);
}

SSL *mint_session(struct mint *m, const struct host *name, int64_t now_s)
{
    struct leaf **at = slot_of(m, name);
    if (*at && (*at)->expires_s - RENEW_S <= now_s)
        drop(m, at);
    struct leaf *l = *at;
    if (l) {
        unlink_age(m, l);
        link_newest(m, l);
        return later_session(m, l);
    }
    X509 *x = make(m, name, now_s);
    l = x ? calloc(1, sizeof *l) : NULL;
    if (!l) {
        X509_free(x);
        return NULL;
    }
    if (m->n == m->capacity)
        drop(m, slot_of(m, &m->oldest->name));
    l->name = *name;
    l->certificate = x;
    l->expires_s = now_s + LIFETIME_S;
    *slot_of(m, name) = l;
    m->n++;
    link_newest(m, l);
    return first_session(m, l);
}

uint64_t mint_count(const struct mint *m)
{
    return m->made;
}
