/* Strict HTTP/1.x message heads and chunked bodies. Pure: no allocation, no I/O, no dependency.
 *
 * A head is accepted only if every reader of it would read the same: CRLF ends a line and nothing else
 * does, no folding, no space before the colon, no control bytes, one Host, one length, HTTP/1.0 or 1.1.
 * What two programs could understand differently is refused, since that is how requests are smuggled.
 * All strings of a parsed head point into the caller's buffer and live as long as it does.
 */
#ifndef HYPEMAN_EGRESS_H1_H
#define HYPEMAN_EGRESS_H1_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    H1_MAX_HEAD = 32 * 1024,
    H1_MAX_FIELDS = 128,
    H1_MAX_TRAILERS = 8 * 1024,
};

/* Results of the parsers below: > 0 bytes consumed, 0 more input is needed, < 0 one of these. */
enum { H1_BAD = -1, H1_TOO_LARGE = -2 };

struct str {
    const char *p;
    uint32_t n;
};

/* Fields that mean something to an intermediary; all others are F_OTHER. */
enum h1_field_id {
    F_OTHER,
    F_HOST,
    F_CONTENT_LENGTH,
    F_TRANSFER_ENCODING,
    F_CONNECTION,
    F_KEEP_ALIVE,
    F_PROXY_CONNECTION,
    F_PROXY_AUTHORIZATION,
    F_PROXY_AUTHENTICATE,
    F_TE,
    F_TRAILER,
    F_UPGRADE,
    F_HTTP2_SETTINGS,
    F_EXPECT,
    F_AUTHORIZATION,
    F_COOKIE,
    F_ALT_SVC,
    F_MAX_FORWARDS,
    F_HYPEMAN, /* X-Hypeman-Egress: only ours */
};

struct field {
    struct str name;
    struct str value;
    enum h1_field_id id;
};

struct head {
    struct str method;    /* requests */
    struct str target;    /* requests; the path in HTTP/2 */
    struct str authority; /* value of Host, or :authority */
    struct str reason;    /* responses */
    int status;           /* responses */
    int minor;            /* HTTP/1.minor */
    bool http2;
    int64_t content_length; /* -1: not given */
    bool chunked;
    bool connection_close;
    bool connection_keep_alive;
    bool connection_upgrade;
    bool expect_continue;
    bool expect_other;
    bool te_trailers;
    unsigned hosts; /* how many Host fields; a request may have at most one */
    unsigned n;
    struct field f[H1_MAX_FIELDS];
};

int h1_parse_request(const char *in, size_t n, struct head *out);
int h1_parse_response(const char *in, size_t n, struct head *out);
/* The fields behind the last chunk up to and with the empty line; framing fields are refused. */
int h1_parse_trailers(const char *in, size_t n, struct head *out);

enum h1_field_id h1_field_id(const char *name, size_t n);
bool h1_is_token(const char *p, size_t n);
bool h1_is_field_value(const char *p, size_t n);
bool h1_is_target(const char *p, size_t n);         /* visible ASCII without '#' */
bool h1_same(struct str a, struct str b);           /* ASCII case does not matter */
bool h1_same_variable(struct str a, struct str b);  /* nor does '-' or '_': one variable to CGI and its like */
bool h1_is(struct str a, const char *lower);        /* the same, against a lower-case literal */
bool h1_list_has(struct str list, struct str item); /* comma-separated tokens, case does not matter */
/* Digits only, below 2^62; -1 otherwise. */
int64_t h1_content_length(struct str value);

/* Decoder of one chunked body. Zeroed is ready. */
struct h1_chunked {
    uint64_t left;
    uint32_t extension; /* bytes of extensions so far, bounded for the whole message */
    uint8_t digits;
    uint8_t state;
};

enum h1_chunk_event { H1_CHUNK_BAD = -1, H1_CHUNK_MORE, H1_CHUNK_DATA, H1_CHUNK_TRAILERS };

/* Reads from in[0..n) and sets *used. On H1_CHUNK_DATA, *data is a run of body bytes inside `in`. After
 * H1_CHUNK_TRAILERS the trailer section begins at in + *used. Call again with the rest until MORE. */
enum h1_chunk_event h1_chunked_next(struct h1_chunked *d, const char *in, size_t n, size_t *used, struct str *data);

#endif
