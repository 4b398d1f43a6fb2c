/* See addr.h. Ranges: IANA special-purpose registries for IPv4 and IPv6. */
#include "addr.h"

#include <arpa/inet.h>
#include <string.h>

static const uint8_t MAPPED[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};

static const struct {
    uint8_t b[4];
    uint8_t prefix;
} SPECIAL_V4[] = {
    {{0, 0, 0, 0}, 8},      {{10, 0, 0, 0}, 8},     {{100, 64, 0, 0}, 10}, {{127, 0, 0, 0}, 8},
    {{169, 254, 0, 0}, 16}, {{172, 16, 0, 0}, 12},  {{192, 0, 0, 0}, 24},  {{192, 0, 2, 0}, 24},
    {{192, 88, 99, 0}, 24}, {{192, 168, 0, 0}, 16}, {{198, 18, 0, 0}, 15}, {{198, 51, 100, 0}, 24},
    {{203, 0, 113, 0}, 24}, {{224, 0, 0, 0}, 4},    {{240, 0, 0, 0}, 4},
};

/* Of IPv6 only 2000::/3 is public, and of that not: Teredo and the other protocol blocks (2001::/23), documentation,
 * 6to4 (it carries any IPv4 address inside), 3fff::/20 documentation. NAT64, ULA, link-local, multicast lie outside. */
static const struct network SPECIAL_V6[] = {
    {{{0x20, 0x01, 0x00}}, 23},
    {{{0x20, 0x01, 0x0d, 0xb8}}, 32},
    {{{0x20, 0x02}}, 16},
    {{{0x3f, 0xff}}, 20},
};

/* What an instance may also be allowed to reach: no metadata services, no addresses of a host itself. */
static const struct network PRIVATE[] = {
    {{{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10}}, 104},
    {{{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 172, 16}}, 108},
    {{{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 168}}, 112},
    {{{0xfc}}, 7},
};

static bool same_bits(const uint8_t *a, const uint8_t *b, unsigned bits)
{
    if (memcmp(a, b, bits / 8) != 0)
        return false;
    unsigned rest = bits % 8;
    return !rest || ((a[bits / 8] ^ b[bits / 8]) >> (8 - rest)) == 0;
}

bool addr_is_v4(struct addr a)
{
    return memcmp(a.b, MAPPED, sizeof MAPPED) == 0;
}

bool addr_in(struct addr a, const struct network *n)
{
    return same_bits(a.b, n->base.b, n->prefix);
}

bool addr_is_public(struct addr a)
{
    if (addr_is_v4(a)) {
        for (size_t i = 0; i < sizeof SPECIAL_V4 / sizeof *SPECIAL_V4; i++)
            if (same_bits(a.b + 12, SPECIAL_V4[i].b, SPECIAL_V4[i].prefix))
                return false;
        return true;
    }
    if ((a.b[0] & 0xe0) != 0x20)
        return false;
    for (size_t i = 0; i < sizeof SPECIAL_V6 / sizeof *SPECIAL_V6; i++)
        if (addr_in(a, &SPECIAL_V6[i]))
            return false;
    return true;
}

bool addr_explicitly_allowed(const struct reach *r, struct addr a)
{
    for (unsigned i = 0; i < r->allowed; i++)
        if (addr_in(a, &r->allow[i]))
            return true;
    return false;
}

static bool is_private(struct addr a)
{
    static const struct network METADATA = {{{0xfd, 0x00, 0x0e, 0xc2}}, 32}; /* fd00:ec2::254, of Amazon */
    for (size_t i = 0; i < sizeof PRIVATE / sizeof *PRIVATE; i++)
        if (addr_in(a, &PRIVATE[i]))
            return !addr_in(a, &METADATA);
    return false;
}

bool addr_reachable(const struct reach *r, struct addr a, enum private private)
{
    for (unsigned i = 0; i < r->denied; i++)
        if (addr_in(a, &r->deny[i]))
            return false;
    if (private == PRIVATE_CLOSED)
        return addr_is_public(a);
    return addr_explicitly_allowed(r, a) || addr_is_public(a) || (private == PRIVATE_OPEN && is_private(a));
}

bool addr_parse(const char *text, struct addr *out)
{
    struct in_addr v4;
    if (inet_pton(AF_INET, text, &v4) == 1) {
        memcpy(out->b, MAPPED, 12);
        memcpy(out->b + 12, &v4, 4);
        return true;
    }
    return inet_pton(AF_INET6, text, out->b) == 1;
}

void addr_text(struct addr a, char out[INET6_ADDRSTRLEN])
{
    if (addr_is_v4(a))
        (void)inet_ntop(AF_INET, a.b + 12, out, INET6_ADDRSTRLEN);
    else
        (void)inet_ntop(AF_INET6, a.b, out, INET6_ADDRSTRLEN);
}

struct addr addr_from_sockaddr(const struct sockaddr_storage *s, uint16_t *port)
{
    struct addr a;
    if (s->ss_family == AF_INET) {
        const struct sockaddr_in *in = (const struct sockaddr_in *)s;
        memcpy(a.b, MAPPED, 12);
        memcpy(a.b + 12, &in->sin_addr, 4);
        *port = ntohs(in->sin_port);
    } else {
        const struct sockaddr_in6 *in = (const struct sockaddr_in6 *)s;
        memcpy(a.b, &in->sin6_addr, 16);
        *port = ntohs(in->sin6_port);
    }
    return a;
}

socklen_t addr_to_sockaddr(struct addr a, uint16_t port, struct sockaddr_storage *out)
{
    memset(out, 0, sizeof *out);
    if (addr_is_v4(a)) {
        struct sockaddr_in *in = (struct sockaddr_in *)out;
        in->sin_family = AF_INET;
        in->sin_port = htons(port);
        memcpy(&in->sin_addr, a.b + 12, 4);
        return sizeof *in;
    }
    struct sockaddr_in6 *in = (struct sockaddr_in6 *)out;
    in->sin6_family = AF_INET6;
    in->sin6_port = htons(port);
    memcpy(&in->sin6_addr, a.b, 16);
    return sizeof *in;
}
