/* See scramble.h. */
#include "scramble.h"

#include <openssl/crypto.h>
#include <openssl/rand.h>
#include <stdlib.h>

_Static_assert(NATIVE_ANSWER == SHA_DIGEST_LENGTH && SHA2_ANSWER == SHA256_DIGEST_LENGTH, "an answer is a hash");

/* OpenSSL's SHA-1 keeps the words of a block, which are a hash here, on the stack: where this is then. */
static __attribute__((noinline)) void wipe_stack(void)
{
    char below[4096];
    OPENSSL_cleanse(below, sizeof below);
}

static void sha1(const void *p, size_t n, const void *q, size_t m, unsigned char out[NATIVE_ANSWER])
{
    SHA_CTX c;
    (void)SHA1_Init(&c);
    (void)SHA1_Update(&c, p, n);
    (void)SHA1_Update(&c, q, m);
    (void)SHA1_Final(out, &c);
    OPENSSL_cleanse(&c, sizeof c);
}

static void sha256(const void *p, size_t n, const void *q, size_t m, unsigned char out[SHA2_ANSWER])
{
    SHA256_CTX c;
    (void)SHA256_Init(&c);
    (void)SHA256_Update(&c, p, n);
    (void)SHA256_Update(&c, q, m);
    (void)SHA256_Final(out, &c);
    OPENSSL_cleanse(&c, sizeof c);
}

void native_answer(struct str password, const char scramble[MY_SCRAMBLE], unsigned char out[NATIVE_ANSWER])
{
    unsigned char once[NATIVE_ANSWER], twice[NATIVE_ANSWER];
    sha1(password.p, password.n, "", 0, once);
    sha1(once, sizeof once, "", 0, twice);
    sha1(scramble, MY_SCRAMBLE, twice, sizeof twice, out);
    for (unsigned i = 0; i < NATIVE_ANSWER; i++)
        out[i] ^= once[i];
    OPENSSL_cleanse(once, sizeof once);
    OPENSSL_cleanse(twice, sizeof twice);
    wipe_stack();
}

void sha2_answer(struct str password, const char scramble[MY_SCRAMBLE], unsigned char out[SHA2_ANSWER])
{
    unsigned char once[SHA2_ANSWER], twice[SHA2_ANSWER];
    sha256(password.p, password.n, "", 0, once);
    sha256(once, sizeof once, "", 0, twice);
    sha256(twice, sizeof twice, scramble, MY_SCRAMBLE, out);
    for (unsigned i = 0; i < SHA2_ANSWER; i++)
        out[i] ^= once[i];
    OPENSSL_cleanse(once, sizeof once);
    OPENSSL_cleanse(twice, sizeof twice);
    wipe_stack();
}

unsigned scramble_answer(struct str plugin, struct str password, const char scramble[MY_SCRAMBLE],
                         unsigned char out[SHA2_ANSWER])
{
    if (str_is(plugin, MY_SHA2)) {
        sha2_answer(password, scramble, out);
        return SHA2_ANSWER;
    }
    if (str_is(plugin, MY_NATIVE)) {
        native_answer(password, scramble, out);
        return NATIVE_ANSWER;
    }
    return 0;
}

void scramble_new(char out[MY_SCRAMBLE])
{
    unsigned char random[MY_SCRAMBLE];
    if (RAND_bytes(random, sizeof random) != 1)
        abort(); /* nothing sensible is left to do */
    for (unsigned i = 0; i < MY_SCRAMBLE; i++)
        out[i] = (char)(0x21 + random[i] % 94);
}
