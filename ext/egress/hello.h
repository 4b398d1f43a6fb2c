/* Reads the server name, and marks of the client's library, from a TLS ClientHello in any number of pieces. Pure.
 *
 * A hello may span records and segments and be larger than 4 KB (post-quantum key shares); a peek of fixed size
 * would break browsers. Nothing is decided before the whole message has arrived.
 */
#ifndef HYPEMAN_EGRESS_HELLO_H
#define HYPEMAN_EGRESS_HELLO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { HELLO_MAX = 32 * 1024 };
enum hello_result { HELLO_BAD = -1, HELLO_MORE, HELLO_OK };

struct hello {
    uint32_t size;     /* bytes of its records */
    uint16_t name_len; /* 0: no server name sent */
    char name[256];    /* as sent, not yet canonical */
    bool acme;         /* acme-tls/1 is the only protocol it offers: a public CA validates the name */
    bool postgres;     /* it offers the protocol of Postgres */
    bool gnutls;       /* the marks of GnuTLS: of libcurl in Debian's and Ubuntu's git, see README.md */
};

/* in[0..n): everything received so far. `scratch` takes the message joined from its records. */
enum hello_result hello_parse(const uint8_t *in, size_t n, uint8_t scratch[HELLO_MAX], struct hello *out);

#endif
