/* See host.h. */
#include "host.h"

#include <arpa/inet.h>
#include <string.h>

static bool is_number(const char *p, size_t n)
{
    bool digits = n > 0, hex = n >= 2 && p[0] == '0' && p[1] == 'x';
    for (size_t i = 0; i < n; i++)
        if (p[i] < '0' || p[i] > '9')
            digits = false;
    for (size_t i = 2; i < n && hex; i++)
        if (!((p[i] >= '0' && p[i] <= '9') || (p[i] >= 'a' && p[i] <= 'f')))
            hex = false;
    return digits || hex;
}

static enum host_kind canonical_v6(struct host *out)
{
    struct in6_addr a;
    if (inet_pton(AF_INET6, out->text, &a) != 1 || !inet_ntop(AF_INET6, &a, out->text, HOST_MAX))
        return HOST_INVALID;
    out->len = (uint8_t)strlen(out->text);
    return out->kind = HOST_IP;
}

enum host_kind host_canonical(const char *p, size_t n, bool bracketed, struct host *out)
{
    out->kind = HOST_INVALID;
    if (n == 0 || n > HOST_MAX || memchr(p, 0, n))
        return HOST_INVALID;
    if (!bracketed && p[n - 1] == '.')
        n--;
    if (n == 0 || n >= HOST_MAX)
        return HOST_INVALID;
    size_t label = 0;
    for (size_t i = 0; i < n; i++) {
        char c = p[i];
        if (c >= 'A' && c <= 'Z')
            c = (char)(c | 0x20);
        out->text[i] = c;
        if (bracketed)
            continue;
        if (c == '.') {
            if (i == label || p[i - 1] == '-')
                return HOST_INVALID;
            label = i + 1;
            continue;
        }
        bool edge = i == label;
        if (!((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' || (c == '-' && !edge)))
            return HOST_INVALID;
        if (i - label >= 63)
            return HOST_INVALID;
    }
    out->text[n] = 0;
    out->len = (uint8_t)n;
    if (bracketed)
        return canonical_v6(out);
    if (label == n || p[n - 1] == '-')
        return HOST_INVALID;
    if (!is_number(out->text + label, n - label))
        return out->kind = HOST_NAME;
    struct in_addr a;
    char again[INET_ADDRSTRLEN];
    if (inet_pton(AF_INET, out->text, &a) != 1 || !inet_ntop(AF_INET, &a, again, sizeof again)
        || strcmp(again, out->text) != 0)
        return HOST_INVALID;
    return out->kind = HOST_IP;
}

enum host_kind host_parse_authority(const char *p, size_t n, struct host *out, uint16_t *port)
{
    out->kind = HOST_INVALID;
    *port = 0;
    const char *end = p + n, *rest;
    bool bracketed = n && p[0] == '[';
    if (bracketed) {
        rest = memchr(p, ']', n);
        if (!rest || host_canonical(p + 1, (size_t)(rest - p - 1), true, out) == HOST_INVALID)
            return HOST_INVALID;
        rest++;
    } else {
        rest = memchr(p, ':', n);
        if (!rest)
            rest = end;
        if (host_canonical(p, (size_t)(rest - p), false, out) == HOST_INVALID)
            return HOST_INVALID;
    }
    if (rest == end)
        return out->kind;
    if (*rest++ != ':' || rest == end || end - rest > 5)
        return out->kind = HOST_INVALID;
    unsigned value = 0;
    for (; rest < end; rest++) {
        if (*rest < '0' || *rest > '9')
            return out->kind = HOST_INVALID;
        value = value * 10 + (unsigned)(*rest - '0');
    }
    if (value == 0 || value > 65535)
        return out->kind = HOST_INVALID;
    *port = (uint16_t)value;
    return out->kind;
}

bool host_matches(const char *pattern, size_t n, bool wildcard, const char *name, size_t name_len)
{
    if (!wildcard)
        return n == name_len && memcmp(pattern, name, n) == 0;
    const char *dot = memchr(name, '.', name_len);
    if (!dot || dot == name)
        return false;
    size_t rest = name_len - (size_t)(dot + 1 - name);
    return rest == n && memcmp(pattern, dot + 1, n) == 0;
}
