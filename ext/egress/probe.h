/* See probe.c. */
#ifndef HYPEMAN_EGRESS_PROBE_H
#define HYPEMAN_EGRESS_PROBE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "site.h"

struct probe_origin {
    const char *tls_name; /* TLS ended here for this name; NULL: plain HTTP */
    bool explicit_proxy;
    uint16_t port;
};

/* `body`: of a request that needs it; signed in place. > 0: bytes consumed, with the head for the host in
 * out[0..*out_n); 0: incomplete; -1: refused with *reason. */
int probe_head(const char *in, size_t n, const uint8_t *rules, size_t rules_n, const struct probe_origin *from,
               char *body, size_t body_n, int64_t now_s, char *out, size_t *out_n, const char **reason);

/* How the rules of an instance (see access.c) decide a request: its reason, and the rule's name in `rule`. NULL:
 * invalid encoding or host. */
const char *probe_access(const uint8_t *rules, size_t rules_n, const char *host, uint16_t port, const char *method,
                         const char *target, bool override, int64_t now_s, char rule[64]);

/* The head for the guest of a request by an ingress, and the host name that it asks for. */
int probe_forward(const char *in, size_t n, const char *client, bool tls, const char *secret, char *out, size_t *out_n,
                  char *host, const char **reason);

/* A routing table by itself. */
struct sites *probe_sites(void);
void probe_sites_free(struct sites *s);
bool probe_find(struct sites *s, const char *host, uint16_t port, char *hostname, char *target);

#endif
