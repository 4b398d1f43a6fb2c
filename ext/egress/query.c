/* See query.h. */
#include "query.h"

#include <string.h>

struct str query_of(struct str path, struct str *before)
{
    const char *mark = memchr(path.p, '?', path.n);
    *before = (struct str){path.p, mark ? (uint32_t)(mark - path.p) : path.n};
    return mark ? (struct str){mark + 1, path.n - before->n - 1} : (struct str){"", 0};
}

struct str next_parameter(struct str *query)
{
    const char *end = memchr(query->p, '&', query->n);
    struct str found = {query->p, end ? (uint32_t)(end - query->p) : query->n};
    uint32_t used = found.n + (end != NULL);
    query->p += used;
    query->n -= used;
    return found;
}

struct str parameter_name(struct str parameter)
{
    const char *equals = memchr(parameter.p, '=', parameter.n);
    return (struct str){parameter.p, equals ? (uint32_t)(equals - parameter.p) : parameter.n};
}

struct str parameter_value(struct str parameter)
{
    uint32_t used = parameter_name(parameter).n;
    used += used < parameter.n;
    return (struct str){parameter.p + used, parameter.n - used};
}

static int hex_digit(char c)
{
    return c >= '0' && c <= '9' ? c - '0'
        : c >= 'a' && c <= 'f'  ? c - 'a' + 10
        : c >= 'A' && c <= 'F'  ? c - 'A' + 10
                                : -1;
}

int next_decoded(struct str *s)
{
    if (!s->n)
        return -1;
    int high = s->n > 2 && s->p[0] == '%' ? hex_digit(s->p[1]) : -1, low = high < 0 ? -1 : hex_digit(s->p[2]);
    unsigned used = low < 0 ? 1 : 3;
    int c = low < 0 ? (unsigned char)s->p[0] : high << 4 | low;
    s->p += used;
    s->n -= used;
    return c;
}

bool same_decoded(struct str a, struct str b)
{
    int x, y;
    do {
        x = next_decoded(&a);
        y = next_decoded(&b);
    } while (x == y && x >= 0);
    return x == y;
}
