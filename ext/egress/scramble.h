/* How passwords of MySQL are shown: what mysql_native_password and caching_sha2_password make of a password and a server's
 * challenge. Pure. Nothing of the password is left on the stack. */
#ifndef HYPEMAN_EGRESS_SCRAMBLE_H
#define HYPEMAN_EGRESS_SCRAMBLE_H

#define OPENSSL_SUPPRESS_DEPRECATED /* SHA1 and SHA256 at once, without allocating */
#include <openssl/sha.h>

#include "mywire.h"

enum { NATIVE_ANSWER = 20, SHA2_ANSWER = 32 };

/* SHA1(password) XOR SHA1(scramble SHA1(SHA1(password))) */
void native_answer(struct str password, const char scramble[MY_SCRAMBLE], unsigned char out[NATIVE_ANSWER]);
/* SHA256(password) XOR SHA256(SHA256(SHA256(password)) scramble) */
void sha2_answer(struct str password, const char scramble[MY_SCRAMBLE], unsigned char out[SHA2_ANSWER]);
/* By the name of the plugin; the bytes of the answer, 0: it is neither. */
unsigned scramble_answer(struct str plugin, struct str password, const char scramble[MY_SCRAMBLE],
                         unsigned char out[SHA2_ANSWER]);
/* A challenge: printable for clients that take it for a text. */
void scramble_new(char out[MY_SCRAMBLE]);

#endif
