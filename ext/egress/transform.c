/* See transform.h. */
#define _GNU_SOURCE
#include "transform.h"

#include "query.h"
#include "sigv4.h"

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
    struct str before, query = query_of(path, &before);
    const char *separator = "?";
    if (!before.n)
        out_add(room, "/", 1);
    out_add(room, before.p, before.n);
    while (query.n) {
        struct str parameter = next_parameter(&query);
        if (sets_parameter(m, parameter_name(parameter)))
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

bool transform_needs_body(const struct matched *m, const struct head *h, struct str path)
{
    return has_kind(m, RULE_SIGV4) && sigv4_needs_body(h, path);
}

enum reason transform(struct out *room, struct out *work, struct matched *m, const struct head *h,
                      const struct destination *to, struct str path, struct body_text body, int64_t now_s)
{
    enum reason why = R_NONE;
    if (body.p && h->expect_continue)
        set_field(m, (struct str){"expect", 6}, (struct str){NULL, 0}); /* it was answered already */
    if (has_kind(m, RULE_QUERY))
        set_parameters(room, m, path);
    if (m->path.n)
        path = m->path;
    if (has_kind(m, RULE_SIGV4))
        why = sigv4_sign(room, work, m, h, to, path, body.p, body.n, now_s);
    return why == R_NONE && room->over ? R_HEAD_TOO_LARGE : why;
}
