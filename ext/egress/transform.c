/* See transform.h. */
#define _GNU_SOURCE
#include "transform.h"

#include <string.h>

static int hex_digit(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* The next byte that the text stands for, percent-decoded; -1 at its end. */
static int next_decoded(struct str *s)
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

static bool same_decoded(struct str a, struct str b)
{
    int x, y;
    do {
        x = next_decoded(&a);
        y = next_decoded(&b);
    } while (x == y && x >= 0);
    return x == y;
}

/* Cuts the next parameter off a query. */
static struct str next_parameter(struct str *query)
{
    const char *end = memchr(query->p, '&', query->n);
    struct str found = {query->p, end ? (uint32_t)(end - query->p) : query->n};
    uint32_t used = found.n + (end != NULL);
    query->p += used;
    query->n -= used;
    return found;
}

static struct str name_of(struct str parameter)
{
    const char *equals = memchr(parameter.p, '=', parameter.n);
    return (struct str){parameter.p, equals ? (uint32_t)(equals - parameter.p) : parameter.n};
}

static bool sets_parameter(const struct matched *m, struct str name)
{
    for (unsigned i = 0; i < m->n; i++)
        if (m->rules[i]->kind == RULE_QUERY && same_decoded(m->rules[i]->name, name))
            return true;
    return false;
}

/* The path with the guest's parameters of those names taken out and ours added. */
static void set_parameters(struct out *room, struct matched *m, struct str path)
{
    size_t start = room->n;
    const char *mark = memchr(path.p, '?', path.n);
    struct str before = {path.p, mark ? (uint32_t)(mark - path.p) : path.n};
    struct str query = {before.p + before.n + (mark != NULL), mark ? path.n - before.n - 1 : 0};
    const char *separator = "?";
    if (!before.n)
        out_add(room, "/", 1);
    out_add(room, before.p, before.n);
    while (query.n) {
        struct str parameter = next_parameter(&query);
        if (sets_parameter(m, name_of(parameter)))
            continue;
        out_add(room, separator, 1);
        out_add(room, parameter.p, parameter.n);
        separator = "&";
    }
    for (unsigned i = 0; i < m->n; i++) {
        const struct rule *r = m->rules[i];
        if (r->kind != RULE_QUERY)
            continue;
        out_add(room, separator, 1);
        out_add(room, r->name.p, r->name.n);
        out_add(room, "=", 1);
        out_add(room, r->value.p, r->value.n);
        separator = "&";
    }
    m->path = (struct str){room->p + start, (uint32_t)(room->n - start)};
}

static bool has_kind(const struct matched *m, enum rule_kind kind)
{
    for (unsigned i = 0; i < m->n; i++)
        if (m->rules[i]->kind == kind)
            return true;
    return false;
}

enum reason transform(struct out *room, struct matched *m, const struct head *h, const struct destination *to,
                      struct str path, int64_t now_s)
{
    (void)h;
    (void)to;
    (void)now_s;
    if (has_kind(m, RULE_QUERY))
        set_parameters(room, m, path);
    return room->over ? R_HEAD_TOO_LARGE : R_NONE;
}
