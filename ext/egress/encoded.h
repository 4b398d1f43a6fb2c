/* Bounded reading of what the program passes as one encoded text; and locked memory that is wiped when freed. */
#ifndef HYPEMAN_EGRESS_ENCODED_H
#define HYPEMAN_EGRESS_ENCODED_H

#include <openssl/crypto.h>
#include <sys/mman.h>

#include "h1.h"

struct reader {
    const uint8_t *p, *end;
    bool bad;
};

static inline uint64_t read_number(struct reader *r, unsigned bytes)
{
    uint64_t v = 0;
    if ((size_t)(r->end - r->p) < bytes) {
        r->bad = true;
        return 0;
    }
    for (unsigned i = 0; i < bytes; i++)
        v |= (uint64_t)*r->p++ << (8 * i);
    return v;
}

static inline struct str read_text(struct reader *r)
{
    unsigned n = (unsigned)read_number(r, 2);
    if (r->bad || (size_t)(r->end - r->p) < n) {
        r->bad = true;
        return (struct str){"", 0};
    }
    struct str s = {(const char *)r->p, n};
    r->p += n;
    return s;
}

/* As they are encoded: two bytes each, low one first. */
struct ports {
    unsigned n;
    const uint8_t *p;
};

static inline struct ports read_ports(struct reader *r)
{
    struct ports found = {.n = (unsigned)read_number(r, 1)};
    found.p = r->p;
    for (unsigned i = 0; i < found.n; i++)
        (void)read_number(r, 2);
    return found;
}

static inline bool has_port(struct ports ports, uint16_t port)
{
    for (unsigned i = 0; i < ports.n; i++)
        if ((ports.p[2 * i] | ports.p[2 * i + 1] << 8) == port)
            return true;
    return false;
}

/* Zeroed; *size is rounded up. NULL without memory. */
static inline void *locked_new(size_t *size)
{
    *size = (*size + 4095) & ~(size_t)4095;
    void *map = mmap(NULL, *size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED)
        return NULL;
    (void)mlock(map, *size); /* best effort: RLIMIT_MEMLOCK may be small */
    (void)madvise(map, *size, MADV_DONTDUMP);
    return map;
}

static inline void locked_free(void *map, size_t size)
{
    OPENSSL_cleanse(map, size);
    (void)munmap(map, size);
}

#endif
