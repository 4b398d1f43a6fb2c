/* See scram.h. */
#include "scram.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/rand.h>
#include <openssl/x509.h>
#include <string.h>

enum { NONCE_BYTES = 18, NONCE_TEXT = 24, SHA256_BLOCK = 64 };

/* ── HMAC ────────────────────────────────────────────────────────────────────────────────────── */

static void sha256(const void *p, size_t n, unsigned char out[SCRAM_HASH])
{
    SHA256_CTX c;
    (void)SHA256_Init(&c);
    (void)SHA256_Update(&c, p, n);
    (void)SHA256_Final(out, &c);
    OPENSSL_cleanse(&c, sizeof c);
}

static void hmac_key(struct scram_key *k, const void *key, size_t n)
{
    unsigned char pad[SHA256_BLOCK] = {0};
    if (n > sizeof pad)
        sha256(key, n, pad);
    else
        memcpy(pad, key, n);
    for (unsigned i = 0; i < sizeof pad; i++)
        pad[i] ^= 0x36;
    (void)SHA256_Init(&k->in);
    (void)SHA256_Update(&k->in, pad, sizeof pad);
    for (unsigned i = 0; i < sizeof pad; i++)
        pad[i] ^= 0x36 ^ 0x5c;
    (void)SHA256_Init(&k->out);
    (void)SHA256_Update(&k->out, pad, sizeof pad);
    OPENSSL_cleanse(pad, sizeof pad);
}

/* `c`: after all of the text. It contains the output then, and is to be wiped. */
static void hmac_end(const struct scram_key *k, SHA256_CTX *c, unsigned char out[SCRAM_HASH])
{
    (void)SHA256_Final(out, c);
    *c = k->out;
    (void)SHA256_Update(c, out, SCRAM_HASH);
    (void)SHA256_Final(out, c);
}

static void hmac(const void *key, size_t key_n, struct str text, unsigned char out[SCRAM_HASH])
{
    struct scram_key k;
    hmac_key(&k, key, key_n);
    SHA256_CTX c = k.in;
    (void)SHA256_Update(&c, text.p, text.n);
    hmac_end(&k, &c, out);
    OPENSSL_cleanse(&c, sizeof c);
    OPENSSL_cleanse(&k, sizeof k);
}

/* ── Texts ───────────────────────────────────────────────────────────────────────────────────── */

static void add(struct scram_text *t, const void *p, size_t n)
{
    n = n < sizeof t->p - t->n ? n : sizeof t->p - t->n;
    memcpy(t->p + t->n, p, n);
    t->n += (unsigned)n;
}

static void add_text(struct scram_text *t, const char *p)
{
    add(t, p, strlen(p));
}

static void add_base64(struct scram_text *t, const void *p, size_t n)
{
    char text[4 * (SCRAM_BINDING + 64) / 3 + 8];
    int size = EVP_EncodeBlock((unsigned char *)text, p, (int)n);
    add(t, text, (size_t)size);
}

static struct str text_of(const struct scram_text *t)
{
    return (struct str){t->p, t->n};
}

/* Strictly; -1: it is none, or has more than `most` bytes. */
static int read_base64(struct str text, unsigned char *out, size_t most)
{
    unsigned char decoded[SCRAM_TEXT], again[SCRAM_TEXT + 4];
    if (!text.n || text.n % 4 || text.n > sizeof decoded)
        return -1;
    int n = EVP_DecodeBlock(decoded, (const unsigned char *)text.p, (int)text.n);
    if (n >= 0)
        n -= (text.p[text.n - 1] == '=') + (text.p[text.n - 2] == '=');
    bool good = n >= 0 && (size_t)n <= most && EVP_EncodeBlock(again, decoded, n) == (int)text.n
        && memcmp(again, text.p, text.n) == 0; /* the one spelling: no stray bits, no white space */
    if (good)
        memcpy(out, decoded, (size_t)n);
    OPENSSL_cleanse(decoded, sizeof decoded);
    OPENSSL_cleanse(again, sizeof again);
    return good ? n : -1;
}

/* An attribute "k=value" up to a comma or the end, cut off the front. */
static bool take_attribute(struct str *from, char name, struct str *out)
{
    if (from->n < 2 || from->p[0] != name || from->p[1] != '=')
        return false;
    const char *end = memchr(from->p, ',', from->n);
    size_t n = end ? (size_t)(end - from->p) : from->n;
    *out = (struct str){from->p + 2, (uint32_t)(n - 2)};
    from->p += n + (end != NULL);
    from->n -= (uint32_t)(n + (end != NULL));
    return true;
}

static bool is_nonce(struct str s)
{
    for (uint32_t i = 0; i < s.n; i++)
        if (s.p[i] < 0x21 || s.p[i] > 0x7e)
            return false;
    return s.n > 0;
}

static void add_nonce(struct scram_text *t, const char *given)
{
    unsigned char random[NONCE_BYTES];
    if (given) {
        add_text(t, given);
        return;
    }
    if (RAND_bytes(random, sizeof random) != 1)
        abort(); /* nothing sensible is left to do */
    add_base64(t, random, sizeof random);
}

struct scram_binding scram_binding_of(const X509 *certificate)
{
    struct scram_binding b = {.n = 0};
    int digest = NID_undef;
    if (!certificate || X509_get_signature_info((X509 *)certificate, &digest, NULL, NULL, NULL) != 1)
        return b;
    if (digest == NID_md5 || digest == NID_sha1)
        digest = NID_sha256; /* RFC 5929 4.1 */
    const EVP_MD *md = EVP_get_digestbynid(digest);
    if (!md || EVP_MD_get_size(md) > SCRAM_BINDING || X509_digest(certificate, md, b.hash, &b.n) != 1)
        b.n = 0;
    return b;
}

/* "c=": the gs2 header and, if the channel is bound, the certificate's hash. */
static void add_channel(struct scram_text *t, const char *gs2, unsigned gs2_n, const struct scram_binding *binding)
{
    unsigned char both[64 + SCRAM_BINDING];
    memcpy(both, gs2, gs2_n);
    memcpy(both + gs2_n, binding->hash, binding->n);
    add_text(t, "c=");
    add_base64(t, both, gs2_n + binding->n);
}

/* client-first-message-bare "," server-first-message "," client-final-message-without-proof */
static void signature(const unsigned char key[SCRAM_HASH], struct str first_bare, struct str server_first,
                      struct str without_proof, unsigned char out[SCRAM_HASH])
{
    struct scram_key k;
    hmac_key(&k, key, SCRAM_HASH);
    SHA256_CTX c = k.in;
    (void)SHA256_Update(&c, first_bare.p, first_bare.n);
    (void)SHA256_Update(&c, ",", 1);
    (void)SHA256_Update(&c, server_first.p, server_first.n);
    (void)SHA256_Update(&c, ",", 1);
    (void)SHA256_Update(&c, without_proof.p, without_proof.n);
    hmac_end(&k, &c, out);
    OPENSSL_cleanse(&c, sizeof c);
    OPENSSL_cleanse(&k, sizeof k);
}

static struct str behind(const struct scram_text *t, unsigned n)
{
    return (struct str){t->p + n, t->n - n};
}

/* ── The client ──────────────────────────────────────────────────────────────────────────────── */

void scram_client_begin(struct scram_client *s, enum scram_bound bound, const struct scram_binding *binding,
                        const char *nonce)
{
    static const char *const GS2[] = {
        [SCRAM_UNBOUND] = "n,,", [SCRAM_NOT_OFFERED] = "y,,", [SCRAM_BOUND] = "p=tls-server-end-point,,"};
    s->first.n = s->server_first.n = s->final.n = 0;
    s->binding = bound == SCRAM_BOUND ? *binding : (struct scram_binding){.n = 0};
    add_text(&s->first, GS2[bound]);
    s->gs2 = s->first.n;
    add_text(&s->first, "n=,r=");
    add_nonce(&s->first, nonce);
}

bool scram_client_take(struct scram_client *s, struct str message, struct str password)
{
    struct str rest = message, nonce, salt_text, count, mine = behind(&s->first, s->gs2 + 5);
    unsigned char salt[256 + 4];
    if (message.n > sizeof s->server_first.p / 2 || !take_attribute(&rest, 'r', &nonce)
        || !take_attribute(&rest, 's', &salt_text) || !take_attribute(&rest, 'i', &count) || rest.n)
        return false;
    if (!is_nonce(nonce) || nonce.n <= mine.n || memcmp(nonce.p, mine.p, mine.n) != 0)
        return false;
    int salt_n = read_base64(salt_text, salt, sizeof salt - 4);
    int64_t iterations = count.n && count.p[0] != '0' ? h1_content_length(count) : -1;
    if (salt_n <= 0 || iterations < SCRAM_LEAST || iterations > SCRAM_MOST)
        return false;
    add(&s->server_first, message.p, message.n);
    add_channel(&s->final, s->first.p, s->gs2, &s->binding);
    add_text(&s->final, ",r=");
    add(&s->final, nonce.p, nonce.n);
    memcpy(salt + salt_n, "\0\0\0\1", 4);
    hmac_key(&s->password, password.p, password.n);
    SHA256_CTX c = s->password.in;
    (void)SHA256_Update(&c, salt, (size_t)salt_n + 4);
    hmac_end(&s->password, &c, s->block);
    OPENSSL_cleanse(&c, sizeof c);
    memcpy(s->salted, s->block, SCRAM_HASH);
    s->left = (unsigned)iterations - 1;
    return true;
}

bool scram_client_derive(struct scram_client *s, unsigned most)
{
    SHA256_CTX c;
    for (; s->left && most; s->left--, most--) {
        c = s->password.in;
        (void)SHA256_Update(&c, s->block, SCRAM_HASH);
        hmac_end(&s->password, &c, s->block);
        for (unsigned i = 0; i < SCRAM_HASH; i++)
            s->salted[i] ^= s->block[i];
    }
    OPENSSL_cleanse(&c, sizeof c);
    return !s->left;
}

void scram_client_prove(struct scram_client *s)
{
    unsigned char client_key[SCRAM_HASH], key[SCRAM_HASH], proof[SCRAM_HASH];
    struct str bare = behind(&s->first, s->gs2), server_first = text_of(&s->server_first), final = text_of(&s->final);
    hmac(s->salted, SCRAM_HASH, str_of("Server Key"), key);
    signature(key, bare, server_first, final, s->server_signature);
    hmac(s->salted, SCRAM_HASH, str_of("Client Key"), client_key);
    sha256(client_key, SCRAM_HASH, key);
    signature(key, bare, server_first, final, proof);
    for (unsigned i = 0; i < SCRAM_HASH; i++)
        proof[i] ^= client_key[i];
    add_text(&s->final, ",p=");
    add_base64(&s->final, proof, SCRAM_HASH);
    OPENSSL_cleanse(client_key, sizeof client_key);
    OPENSSL_cleanse(key, sizeof key);
    OPENSSL_cleanse(s->salted, sizeof s->salted);
    OPENSSL_cleanse(s->block, sizeof s->block);
    OPENSSL_cleanse(&s->password, sizeof s->password);
}

bool scram_client_trusts(const struct scram_client *s, struct str message)
{
    struct str text;
    unsigned char given[SCRAM_HASH];
    return take_attribute(&message, 'v', &text) && !message.n && read_base64(text, given, sizeof given) == SCRAM_HASH
        && CRYPTO_memcmp(given, s->server_signature, SCRAM_HASH) == 0;
}

/* ── The server ──────────────────────────────────────────────────────────────────────────────── */

bool scram_verifier_read(struct scram_verifier *v, struct str text)
{
    return read_base64(text, (unsigned char *)v, sizeof *v) == (int)sizeof *v;
}

bool scram_server_begin(struct scram_server *s, const struct scram_verifier *v, bool bound,
                        const struct scram_binding *binding, struct str message, const char *nonce)
{
    static const char PLUS[] = "p=tls-server-end-point,,";
    struct str rest = message, name, theirs;
    memset(s, 0, sizeof *s);
    if (message.n > sizeof s->client_first.p / 4)
        return false;
    /* "y": it takes us for a server without binding, though one was offered: somebody has changed what we said */
    s->gs2 = bound ? sizeof PLUS - 1 : 3;
    if (rest.n < s->gs2 || memcmp(rest.p, bound ? PLUS : "n,,", s->gs2) != 0)
        return false;
    rest = (struct str){rest.p + s->gs2, rest.n - s->gs2};
    if (!take_attribute(&rest, 'n', &name) || !take_attribute(&rest, 'r', &theirs) || rest.n || !is_nonce(theirs))
        return false;
    if (bound)
        s->binding = *binding;
    add(&s->client_first, message.p, message.n);
    add_text(&s->first, "r=");
    add(&s->first, theirs.p, theirs.n);
    add_nonce(&s->first, nonce);
    add_channel(&s->final, message.p, s->gs2, &s->binding);
    add_text(&s->final, ",");
    add(&s->final, s->first.p, s->first.n); /* what the client's last message must begin with */
    add_text(&s->first, ",s=");
    add_base64(&s->first, v->salt, SCRAM_SALT);
    add_text(&s->first, ",i=4096");
    return true;
}

bool scram_server_trusts(struct scram_server *s, const struct scram_verifier *v, struct str message)
{
    struct str rest, proof_text, expected = text_of(&s->final);
    unsigned char proof[SCRAM_HASH], ours[SCRAM_HASH], key[SCRAM_HASH];
    if (message.n <= expected.n + 1 || memcmp(message.p, expected.p, expected.n) != 0 || message.p[expected.n] != ',')
        return false;
    rest = (struct str){message.p + expected.n + 1, message.n - expected.n - 1};
    if (!take_attribute(&rest, 'p', &proof_text) || rest.n
        || read_base64(proof_text, proof, sizeof proof) != SCRAM_HASH)
        return false;
    struct str bare = behind(&s->client_first, s->gs2), first = text_of(&s->first);
    signature(v->stored_key, bare, first, expected, ours);
    for (unsigned i = 0; i < SCRAM_HASH; i++)
        key[i] = proof[i] ^ ours[i];
    sha256(key, SCRAM_HASH, ours);
    if (CRYPTO_memcmp(ours, v->stored_key, SCRAM_HASH) != 0)
        return false;
    signature(v->server_key, bare, first, expected, ours);
    s->final.n = 0;
    add_text(&s->final, "v=");
    add_base64(&s->final, ours, SCRAM_HASH);
    return true;
}

/* ── The older hash ──────────────────────────────────────────────────────────────────────────── */

static void hex(const unsigned char hash[16], char out[32])
{
    for (unsigned i = 0; i < 16; i++) {
        out[2 * i] = "0123456789abcdef"[hash[i] >> 4];
        out[2 * i + 1] = "0123456789abcdef"[hash[i] & 15];
    }
}

void md5_answer(struct str password, const char *role, struct str salt, char out[36])
{
    MD5_CTX m;
    unsigned char hash[16];
    char inner[32];
    (void)MD5_Init(&m);
    (void)MD5_Update(&m, password.p, password.n);
    (void)MD5_Update(&m, role, strlen(role));
    (void)MD5_Final(hash, &m);
    hex(hash, inner);
    (void)MD5_Init(&m);
    (void)MD5_Update(&m, inner, sizeof inner);
    (void)MD5_Update(&m, salt.p, salt.n);
    (void)MD5_Final(hash, &m);
    memcpy(out, "md5", 3);
    hex(hash, out + 3);
    out[35] = 0;
    OPENSSL_cleanse(inner, sizeof inner);
}
