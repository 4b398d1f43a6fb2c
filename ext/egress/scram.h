/* How passwords of Postgres are shown: SCRAM-SHA-256 and SCRAM-SHA-256-PLUS (RFC 5802, 7677), both sides. Pure.
 *
 * The client's side holds secrets equivalent to the password: it is in memory from locked_new (encoded.h) and wiped
 * with it; no copy is left elsewhere, OpenSSL's own memory included. The server's side needs no secret. Names of users
 * are not part of it: Postgres takes them from the startup message.
 */
#ifndef HYPEMAN_EGRESS_SCRAM_H
#define HYPEMAN_EGRESS_SCRAM_H

/* The hash as a plain structure, so that keys are in no memory but ours; deprecated in favour of allocated ones. */
#define OPENSSL_SUPPRESS_DEPRECATED
#include <openssl/md5.h>
#include <openssl/sha.h>
#include <openssl/ssl.h>

#include "verdict.h"

enum {
    SCRAM_HASH = 32,
    SCRAM_TEXT = 1024,  /* of a message */
    SCRAM_LEAST = 4096, /* iterations: as RFC 7677 has it, and Postgres by default */
    SCRAM_MOST = 1000000,
    SCRAM_BINDING = 64, /* of a certificate's hash */
    SCRAM_SALT = 16,
};

#define SCRAM "SCRAM-SHA-256"
#define SCRAM_PLUS "SCRAM-SHA-256-PLUS"

/* tls-server-end-point (RFC 5929): the hash of the server's certificate; n 0: its signature names none. */
struct scram_binding {
    unsigned char hash[SCRAM_BINDING];
    unsigned n;
};

struct scram_binding scram_binding_of(const X509 *certificate);

struct scram_text {
    unsigned n;
    char p[SCRAM_TEXT];
};

struct scram_key { /* HMAC with a key: the hash after its padded key, inside and outside */
    SHA256_CTX in, out;
};

/* ── The client ──────────────────────────────────────────────────────────────────────────────── */

struct scram_client {
    struct scram_text first; /* client-first-message */
    struct scram_text server_first, final;
    unsigned gs2;                 /* bytes of its beginning that are not part of what is signed */
    struct scram_binding binding; /* n 0: none is used */
    unsigned left;                /* iterations */
    struct scram_key password;
    unsigned char block[SCRAM_HASH], salted[SCRAM_HASH], server_signature[SCRAM_HASH];
};

/* How the channel is bound: not (no TLS, or it cannot be); not, as the server offers none; by its certificate. */
enum scram_bound { SCRAM_UNBOUND, SCRAM_NOT_OFFERED, SCRAM_BOUND };

void scram_client_begin(struct scram_client *s, enum scram_bound bound, const struct scram_binding *binding,
                        const char *nonce); /* nonce NULL: a random one */
/* Takes the server's first message; false: it is none that we answer. */
bool scram_client_take(struct scram_client *s, struct str server_first, struct str password);
/* Goes on with the key derivation by at most so many iterations; true: it is done. */
bool scram_client_derive(struct scram_client *s, unsigned most);
/* Makes the final message. */
void scram_client_prove(struct scram_client *s);
/* Whether the server has shown that it knows the password as well. */
bool scram_client_trusts(const struct scram_client *s, struct str server_final);

/* ── The server ──────────────────────────────────────────────────────────────────────────────── */

struct scram_verifier {
    unsigned char salt[SCRAM_SALT], stored_key[SCRAM_HASH], server_key[SCRAM_HASH];
};

struct scram_server {
    struct scram_text client_first; /* with its gs2 header */
    struct scram_text first, final;
    unsigned gs2;
    struct scram_binding binding; /* of our certificate */
    bool bound;
};

/* base64 of salt, StoredKey and ServerKey, one behind the other; false: it is none. */
bool scram_verifier_read(struct scram_verifier *v, struct str text);
/* Takes the client's first message for the mechanism (bound: PLUS) and makes the answer. `nonce` NULL: a random one. */
bool scram_server_begin(struct scram_server *s, const struct scram_verifier *v, bool bound,
                        const struct scram_binding *binding, struct str client_first, const char *nonce);
/* True: the client knows the password, and `final` is to be sent. */
bool scram_server_trusts(struct scram_server *s, const struct scram_verifier *v, struct str client_final);

/* What Postgres had before SCRAM: "md5", and in hexadecimal md5(hex(md5(password, role)), salt), as a text. */
void md5_answer(struct str password, const char *role, struct str salt, char out[36]);

#endif
