/* See chain.h. First OpenSSL's own path, which is nearly always the one. If it fails, a search over all paths: depth
 * first, an issuer being any certificate of the name, trusted ones first. Each complete path is verified by OpenSSL as
 * if the host had sent just that one, under the same parameters (host name, purpose, strictness, time), so nothing is
 * decided here that OpenSSL would not decide.
 *
 * Key identifiers only help to choose among issuers (RFC 5280 4.2.1.1); one that fits none forbids none, as a signature
 * decides. The bounds are for hosts that send many certificates: at most MAX_PATHS are verified and MAX_STEPS tried.
 */
#include "chain.h"

#include <openssl/x509.h>
#include <stdbool.h>

enum { MAX_DEPTH = 8, MAX_PATHS = 48, MAX_STEPS = 2048 };

struct search {
    X509_STORE_CTX *ctx; /* the handshake's */
    X509 *path[MAX_DEPTH];
    int depth;
    unsigned paths, steps;
};

/* Any certificate of that name may be the issuer; the signature is checked afterwards. */
static int by_name(X509_STORE_CTX *ctx, X509 *subject, X509 *issuer)
{
    (void)ctx;
    return X509_NAME_cmp(X509_get_issuer_name(subject), X509_get_subject_name(issuer)) == 0;
}

/* Verifies path[0..depth), whose last is trusted, and nothing else. */
static bool verify_path(struct search *s)
{
    X509_STORE *store = X509_STORE_new();
    X509_STORE_CTX *ctx = X509_STORE_CTX_new();
    STACK_OF(X509) *between = sk_X509_new_null();
    bool ok = store && ctx && between && X509_STORE_add_cert(store, s->path[s->depth - 1]) == 1;
    for (int i = 1; ok && i + 1 < s->depth; i++)
        ok = sk_X509_push(between, s->path[i]) > 0;
    if (ok) {
        X509_STORE_set_check_issued(store, by_name);
        ok = X509_STORE_CTX_init(ctx, store, s->path[0], between) == 1
            && X509_VERIFY_PARAM_set1(X509_STORE_CTX_get0_param(ctx), X509_STORE_CTX_get0_param(s->ctx)) == 1
            && X509_verify_cert(ctx) == 1;
    }
    if (ok) {
        X509_STORE_CTX_set0_verified_chain(s->ctx, X509_STORE_CTX_get1_chain(ctx));
        X509_STORE_CTX_set_error(s->ctx, X509_V_OK);
        X509_STORE_CTX_set_error_depth(s->ctx, 0);
    }
    sk_X509_free(between);
    X509_STORE_CTX_free(ctx);
    X509_STORE_free(store);
    return ok;
}

static bool is_on_path(const struct search *s, X509 *x)
{
    for (int i = 0; i < s->depth; i++)
        if (X509_cmp(s->path[i], x) == 0)
            return true;
    return false;
}

static bool extend(struct search *s);

static bool try_issuer(struct search *s, X509 *issuer, bool trusted)
{
    X509 *last = s->path[s->depth - 1];
    if (++s->steps > MAX_STEPS || s->paths >= MAX_PATHS || is_on_path(s, issuer))
        return false;
    if (X509_NAME_cmp(X509_get_issuer_name(last), X509_get_subject_name(issuer)) != 0)
        return false;
    EVP_PKEY *key = X509_get0_pubkey(issuer);
    if (!key || X509_verify(last, key) != 1) /* another key of that name */
        return false;
    s->path[s->depth++] = issuer;
    bool found;
    if (trusted) {
        s->paths++;
        found = verify_path(s);
    } else {
        found = extend(s);
    }
    s->depth--;
    return found;
}

static bool extend(struct search *s)
{
    X509 *last = s->path[s->depth - 1];
    bool found = false;
    if (s->depth == MAX_DEPTH)
        return false;
    STACK_OF(X509) *trusted = X509_STORE_CTX_get1_certs(s->ctx, X509_get_issuer_name(last));
    for (int i = 0; !found && i < sk_X509_num(trusted); i++)
        found = try_issuer(s, sk_X509_value(trusted, i), true);
    sk_X509_pop_free(trusted, X509_free);
    STACK_OF(X509) *sent = X509_STORE_CTX_get0_untrusted(s->ctx);
    for (int i = 0; !found && i < sk_X509_num(sent); i++)
        found = try_issuer(s, sk_X509_value(sent, i), false);
    return found;
}

int chain_verify(X509_STORE_CTX *ctx, void *unused)
{
    (void)unused;
    if (X509_verify_cert(ctx) == 1)
        return 1;
    int error = X509_STORE_CTX_get_error(ctx), depth = X509_STORE_CTX_get_error_depth(ctx);
    struct search s = {.ctx = ctx, .path = {X509_STORE_CTX_get0_cert(ctx)}, .depth = 1};
    if (s.path[0] && extend(&s))
        return 1;
    X509_STORE_CTX_set_error(ctx, error);
    X509_STORE_CTX_set_error_depth(ctx, depth);
    return 0;
}
