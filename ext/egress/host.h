/* Names of hosts: one spelling for each, so that a name that selects a credential is the name that is dialled and
 * verified. Pure. */
#ifndef HYPEMAN_EGRESS_HOST_H
#define HYPEMAN_EGRESS_HOST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { HOST_MAX = 254 }; /* 253 and the closing zero */

enum host_kind { HOST_INVALID, HOST_NAME, HOST_IP };

struct host {
    enum host_kind kind;
    uint8_t len;
    char text[HOST_MAX];
};

/* Lower case, without one trailing dot; labels of letters, digits, '-' and '_'. A last label that is a number makes
 * it an address, which must then be a plain dotted quad (resolvers read 127.1 and 0x7f.1 as addresses too).
 * `bracketed`: an IPv6 address is expected, brackets already removed. */
enum host_kind host_canonical(const char *p, size_t n, bool bracketed, struct host *out);

/* "host", "host:port", "[v6]:port". *port is 0 if none is given. */
enum host_kind host_parse_authority(const char *p, size_t n, struct host *out, uint16_t *port);

/* Whether `pattern` covers the name: equal, or for a wildcard ("*.x.y" without its "*.") with exactly one more label.
 * */
bool host_matches(const char *pattern, size_t n, bool wildcard, const char *name, size_t name_len);

#endif
