/* See probe.c. */
#ifndef HYPEMAN_EGRESS_PROBE_H
#define HYPEMAN_EGRESS_PROBE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct probe_origin {
    const char *tls_name; /* TLS ended here for this name; NULL: plain HTTP */
    bool explicit_proxy;
    uint16_t port;
};

/* `body`: of a request that needs it; signed in place. > 0 bytes consumed and the head for the host in out[0..*out_n); 0 incomplete; -1 refused with *reason. */
int probe_head(const char *in, size_t n, const uint8_t *rules, size_t rules_n, const struct probe_origin *from,
               char *body, size_t body_n, int64_t now_s, char *out, size_t *out_n, const char **reason);

/* What the rules of an instance (see access.c) say of a request: its reason, and the rule's name in `rule`. NULL: that is
 * no encoding, or no host. */
const char *probe_access(const uint8_t *rules, size_t rules_n, const char *host, uint16_t port, const char *method,
                         const char *target, bool override, int64_t now_s, char rule[64]);

#endif
