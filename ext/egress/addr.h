/* Which addresses a guest's traffic may be carried to. Pure.
 *
 * Addresses are kept as 16 bytes, IPv4 as ::ffff:a.b.c.d, so that one rule holds for both families and a mapped address
 * bypasses none. Anything that is not clearly a public unicast address is forbidden; configuration may allow networks
 * of it, and may deny others. Denying wins.
 */
#ifndef HYPEMAN_EGRESS_ADDR_H
#define HYPEMAN_EGRESS_ADDR_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

struct addr {
    uint8_t b[16];
};

struct network {
    struct addr base;
    uint8_t prefix; /* of 128 */
};

enum { MAX_NETWORKS = 64 };

/* Private networks around the host: as configured, or opened or closed for one instance. */
enum private { PRIVATE_AS_CONFIGURED, PRIVATE_OPEN, PRIVATE_CLOSED };

struct reach {
    unsigned allowed, denied;
    struct network allow[MAX_NETWORKS];
    struct network deny[MAX_NETWORKS];
};

bool addr_is_v4(struct addr a);
bool addr_in(struct addr a, const struct network *n);
bool addr_is_public(struct addr a);
bool addr_reachable(const struct reach *r, struct addr a, enum private private);
/* Allowed by name in configuration, so that even an address of the host itself may be dialled. */
bool addr_explicitly_allowed(const struct reach *r, struct addr a);

bool addr_parse(const char *text, struct addr *out);
void addr_text(struct addr a, char out[INET6_ADDRSTRLEN]);
struct addr addr_from_sockaddr(const struct sockaddr_storage *s, uint16_t *port);
socklen_t addr_to_sockaddr(struct addr a, uint16_t port, struct sockaddr_storage *out);

#endif
