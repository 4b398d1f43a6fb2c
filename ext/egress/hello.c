/* See hello.h. RFC 8446 §4.1.2, RFC 6066 §3. */
#include "hello.h"

#include <string.h>

enum { HANDSHAKE = 22, CLIENT_HELLO = 1 };
enum { SERVER_NAME = 0, ALPN = 16, ENCRYPT_THEN_MAC = 22, RECORD_SIZE_LIMIT = 28 };

/* A window on bytes; every read checks what is left. */
struct window {
    const uint8_t *p;
    size_t n;
};

static bool take(struct window *w, size_t n, struct window *out)
{
    if (w->n < n)
        return false;
    *out = (struct window){w->p, n};
    w->p += n;
    w->n -= n;
    return true;
}

static bool number(struct window *w, unsigned bytes, size_t *out)
{
    struct window d;
    if (!take(w, bytes, &d))
        return false;
    *out = 0;
    for (unsigned i = 0; i < bytes; i++)
        *out = *out << 8 | d.p[i];
    return true;
}

/* A vector with a length of `bytes` in front. */
static bool vector(struct window *w, unsigned bytes, struct window *out)
{
    size_t n;
    return number(w, bytes, &n) && take(w, n, out);
}

static bool read_server_name(struct window ext, struct hello *out)
{
    struct window list, name;
    size_t kind;
    if (!vector(&ext, 2, &list) || ext.n)
        return false;
    if (!number(&list, 1, &kind) || kind != 0 || !vector(&list, 2, &name) || list.n)
        return false;
    if (name.n == 0 || name.n >= sizeof out->name || memchr(name.p, 0, name.n))
        return false;
    memcpy(out->name, name.p, name.n);
    out->name_len = (uint16_t)name.n;
    return true;
}

static bool is_acme(struct window ext)
{
    static const uint8_t ONLY[] = "\0\x0b\x0a"
                                  "acme-tls/1"; /* a list of one */
    return ext.n == sizeof ONLY - 1 && memcmp(ext.p, ONLY, ext.n) == 0;
}

static bool has_postgres(struct window ext)
{
    static const uint8_t NAME[] = "postgresql";
    struct window list, name;
    bool found = false;
    if (!vector(&ext, 2, &list) || ext.n)
        return false;
    while (list.n) {
        if (!vector(&list, 1, &name))
            return false;
        found |= name.n == sizeof NAME - 1 && memcmp(name.p, NAME, name.n) == 0;
    }
    return found;
}

static bool read_message(struct window m, struct hello *out)
{
    struct window skip, extensions, ext;
    size_t kind;
    bool name = false, mac = false, limit = false;
    if (!take(&m, 2 + 32, &skip) || !vector(&m, 1, &skip) || !vector(&m, 2, &skip) || !vector(&m, 1, &skip))
        return false;
    if (m.n == 0)
        return true; /* TLS 1.2 without extensions */
    if (!vector(&m, 2, &extensions) || m.n)
        return false;
    while (extensions.n) {
        if (!number(&extensions, 2, &kind) || !vector(&extensions, 2, &ext))
            return false;
        if (kind == SERVER_NAME) {
            if (name || !read_server_name(ext, out))
                return false;
            name = true;
        }
        out->acme |= kind == ALPN && is_acme(ext);
        out->postgres |= kind == ALPN && has_postgres(ext);
        mac |= kind == ENCRYPT_THEN_MAC;
        limit |= kind == RECORD_SIZE_LIMIT;
    }
    out->gnutls = mac && limit; /* OpenSSL sends the first only, NSS the second, BoringSSL, Go and rustls neither */
    return true;
}

enum hello_result hello_parse(const uint8_t *in, size_t n, uint8_t scratch[HELLO_MAX], struct hello *out)
{
    struct window w = {in, n}, fragment;
    size_t joined = 0, wanted = 4;
    memset(out, 0, sizeof *out);
    while (joined < wanted) {
        size_t type, version, length;
        struct window at = w;
        if (at.n && at.p[0] != HANDSHAKE)
            return HELLO_BAD;
        if (at.n > 1 && at.p[1] != 3)
            return HELLO_BAD;
        if (!number(&at, 1, &type) || !number(&at, 2, &version) || !number(&at, 2, &length))
            return HELLO_MORE;
        if (length == 0 || length > 16384)
            return HELLO_BAD;
        if (at.n < length) { /* an unfinished record: use what is there to refuse early, then wait */
            if (joined == 0 && at.n && at.p[0] != CLIENT_HELLO)
                return HELLO_BAD;
            return n > HELLO_MAX ? HELLO_BAD : HELLO_MORE;
        }
        (void)take(&at, length, &fragment);
        w = at;
        if (joined + length > HELLO_MAX)
            return HELLO_BAD;
        memcpy(scratch + joined, fragment.p, length);
        joined += length;
        if (joined >= 4) {
            if (scratch[0] != CLIENT_HELLO)
                return HELLO_BAD;
            wanted = 4 + ((size_t)scratch[1] << 16 | (size_t)scratch[2] << 8 | scratch[3]);
            if (wanted > HELLO_MAX)
                return HELLO_BAD;
        }
    }
    if (joined != wanted) /* nothing may follow a ClientHello in its record */
        return HELLO_BAD;
    out->size = (uint32_t)(w.p - in);
    return read_message((struct window){scratch + 4, wanted - 4}, out) ? HELLO_OK : HELLO_BAD;
}
