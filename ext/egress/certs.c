/* See certs.h. */
#include "certs.h"

#include <stdlib.h>
#include <string.h>

struct cert {
    struct cert *next;
    SSL_CTX *ctx, *challenge;
    char token[TOKEN_MAX], proof[PROOF_MAX];
    char name[HOST_MAX + 2];
};

static struct cert **slot_of(struct certs *c, const char *name)
{
    unsigned h = 0;
    while (*name)
        h = h * 33 + (unsigned char)*name++;
    return &c->slots[(h ^ h >> 10) % CERT_SLOTS];
}

/* All below with the lock held. */
static struct cert **find(struct certs *c, const char *name)
{
    struct cert **at = slot_of(c, name);
    while (*at && strcmp((*at)->name, name) != 0)
        at = &(*at)->next;
    return at;
}

static struct cert *get(struct certs *c, const char *name)
{
    struct cert **at = find(c, name);
    if (!*at && strlen(name) < sizeof(*at)->name) {
        *at = calloc(1, sizeof **at);
        if (*at)
            strcpy((*at)->name, name);
    }
    return *at;
}

static void drop_if_empty(struct certs *c, const char *name)
{
    struct cert **at = find(c, name), *cert = *at;
    if (cert && !cert->ctx && !cert->challenge && !cert->token[0]) {
        *at = cert->next;
        free(cert);
    }
}

void certs_init(struct certs *c)
{
    memset(c, 0, sizeof *c);
    (void)pthread_mutex_init(&c->lock, NULL);
}

void certs_destroy(struct certs *c)
{
    for (unsigned i = 0; i < CERT_SLOTS; i++)
        while (c->slots[i]) {
            struct cert *next = c->slots[i]->next;
            SSL_CTX_free(c->slots[i]->ctx);
            SSL_CTX_free(c->slots[i]->challenge);
            free(c->slots[i]);
            c->slots[i] = next;
        }
    (void)pthread_mutex_destroy(&c->lock);
}

bool certs_put(struct certs *c, const char *name, SSL_CTX *ctx)
{
    (void)pthread_mutex_lock(&c->lock);
    struct cert *at = get(c, name);
    SSL_CTX *old = at ? at->ctx : ctx;
    if (at)
        at->ctx = ctx;
    drop_if_empty(c, name);
    (void)pthread_mutex_unlock(&c->lock);
    SSL_CTX_free(old);
    return at != NULL;
}

bool certs_challenge(struct certs *c, const char *name, const char *token, const char *proof, SSL_CTX *ctx)
{
    (void)pthread_mutex_lock(&c->lock);
    struct cert *at = strlen(token) < TOKEN_MAX && strlen(proof) < PROOF_MAX ? get(c, name) : NULL;
    SSL_CTX *old = at ? at->challenge : ctx;
    if (at) {
        at->challenge = ctx;
        strcpy(at->token, token);
        strcpy(at->proof, proof);
        drop_if_empty(c, name);
    }
    (void)pthread_mutex_unlock(&c->lock);
    SSL_CTX_free(old);
    return at != NULL;
}

SSL *certs_session(struct certs *c, const struct host *name, bool challenge)
{
    char wildcard[HOST_MAX + 2] = "*";
    const char *dot = strchr(name->text, '.');
    SSL *ssl = NULL;
    (void)pthread_mutex_lock(&c->lock);
    const struct cert *at = *find(c, name->text);
    SSL_CTX *ctx = at ? challenge ? at->challenge : at->ctx : NULL;
    if (!ctx && !challenge && dot) {
        strcpy(wildcard + 1, dot);
        at = *find(c, wildcard);
        ctx = at ? at->ctx : NULL;
    }
    if (ctx)
        ssl = SSL_new(ctx); /* takes a reference */
    (void)pthread_mutex_unlock(&c->lock);
    return ssl;
}

bool certs_proof(struct certs *c, const struct host *name, const char *token, size_t n, char proof[PROOF_MAX])
{
    (void)pthread_mutex_lock(&c->lock);
    const struct cert *at = *find(c, name->text);
    bool fits = at && n && strlen(at->token) == n && memcmp(at->token, token, n) == 0;
    if (fits)
        strcpy(proof, at->proof);
    (void)pthread_mutex_unlock(&c->lock);
    return fits;
}
