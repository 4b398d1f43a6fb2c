/* See access.h.
 *
 * Encoding, little-endian: u8 default; u8 observe; u16 rules; u32 names, methods and paths of all; then for each rule:
 * text name; u8 action; u8 record; u8 every host; i64 until; u8 n and u16 ports; u8 n and texts of methods; u8 n and
 * texts of paths; u16 n and hosts, each u8 kind (0 exact, 1 one label more, 2 one or more) and text. A text is u16
 * length and bytes.
 */
#include "access.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { EXACT, ONE_LABEL, ANY_LABELS, NONE = 0xffffffff };

/* A host of a rule, in the chain of its hash, in the order of the rules. */
struct entry {
    struct str host;
    uint8_t kind;
    uint16_t rule;
    uint32_t next;
};

struct access {
    enum access_action otherwise;
    bool observe;
    unsigned n, everywhere;
    uint32_t mask;
    struct access_rule *rules;
    struct str *texts;
    struct entry *entries;
    uint32_t *heads;
    uint16_t *every_host; /* rules for every host, in order */
};

static uint32_t hash_of(const char *p, size_t n, unsigned kind)
{
    uint32_t h = 2166136261u ^ kind;
    for (size_t i = 0; i < n; i++)
        h = (h ^ (unsigned char)p[i]) * 16777619u;
    return h ^ h >> 15;
}

static const struct str *read_texts(struct reader *r, unsigned *n, struct str **at, const struct str *end)
{
    const struct str *first = *at;
    *n = (unsigned)read_number(r, 1);
    for (unsigned i = 0; i < *n && !r->bad; i++) {
        if (*at == end)
            r->bad = true;
        else
            *(*at)++ = read_text(r);
    }
    return first;
}

static void read_rule(struct reader *r, struct access *a, unsigned number_of, struct str **at, const struct str *end,
                      unsigned *entries, unsigned most)
{
    struct access_rule *rule = &a->rules[number_of];
    rule->name = read_text(r);
    unsigned action = (unsigned)read_number(r, 1), record = (unsigned)read_number(r, 1);
    rule->every_host = read_number(r, 1) != 0;
    rule->until_s = (int64_t)read_number(r, 8);
    rule->ports = read_ports(r);
    rule->method = read_texts(r, &rule->methods, at, end);
    rule->path = read_texts(r, &rule->paths, at, end);
    if (action > ACCESS_ASK || record > RECORD_QUERY || rule->name.n > ACCESS_NAME_MAX)
        r->bad = true;
    rule->action = (enum access_action)action;
    rule->record = (enum access_record)record;
    unsigned hosts = (unsigned)read_number(r, 2);
    for (unsigned i = 0; i < hosts && !r->bad; i++) {
        if (*entries == most) {
            r->bad = true;
            break;
        }
        struct entry *e = &a->entries[(*entries)++];
        e->kind = (uint8_t)read_number(r, 1);
        e->host = read_text(r);
        e->rule = (uint16_t)number_of;
        if (e->kind > ANY_LABELS)
            r->bad = true;
    }
    if (rule->every_host)
        a->every_host[a->everywhere++] = (uint16_t)number_of;
}

static void link_entries(struct access *a, unsigned entries)
{
    for (uint32_t i = 0; i <= a->mask; i++)
        a->heads[i] = NONE;
    for (unsigned i = entries; i--;) { /* backwards, so that chains are in the order of the rules */
        struct entry *e = &a->entries[i];
        uint32_t *head = &a->heads[hash_of(e->host.p, e->host.n, e->kind) & a->mask];
        e->next = *head;
        *head = i;
    }
}

struct access *access_decode(const uint8_t *copy, size_t n)
{
    struct reader r = {copy, copy + n, false};
    unsigned otherwise = (unsigned)read_number(&r, 1), observe = (unsigned)read_number(&r, 1);
    unsigned rules = (unsigned)read_number(&r, 2);
    uint32_t names = (uint32_t)read_number(&r, 4);
    if (r.bad || otherwise > ACCESS_DENY || observe > 1 || rules > MAX_ACCESS_RULES || names > MAX_ACCESS_NAMES) {
        errno = EINVAL;
        return NULL;
    }
    uint32_t heads = 16;
    while (heads < 2 * names)
        heads *= 2;
    struct access *a = calloc(1, sizeof *a);
    if (!a)
        return NULL;
    a->rules = calloc(rules + 1, sizeof *a->rules);
    a->texts = calloc(names + 1, sizeof *a->texts);
    a->entries = calloc(names + 1, sizeof *a->entries);
    a->heads = calloc(heads, sizeof *a->heads);
    a->every_host = calloc(rules + 1, sizeof *a->every_host);
    if (!a->rules || !a->texts || !a->entries || !a->heads || !a->every_host) {
        access_free(a);
        return NULL;
    }
    a->otherwise = (enum access_action)otherwise;
    a->observe = observe;
    a->n = rules;
    a->mask = heads - 1;
    struct str *at = a->texts;
    unsigned entries = 0;
    for (unsigned i = 0; i < rules && !r.bad; i++)
        read_rule(&r, a, i, &at, a->texts + names, &entries, names);
    if (r.bad || r.p != r.end) {
        access_free(a);
        errno = EINVAL;
        return NULL;
    }
    link_entries(a, entries);
    return a;
}

void access_free(struct access *a)
{
    if (!a)
        return;
    free(a->rules);
    free(a->texts);
    free(a->entries);
    free(a->heads);
    free(a->every_host);
    free(a);
}

bool access_observes(const struct access *a)
{
    return a->observe;
}

static int hex(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'A' && c <= 'F')
        return c - 'A' + 10;
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    return -1;
}

static bool is_unreserved(int c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_'
        || c == '~';
}

static bool begins_parameters(const char *p, size_t n)
{
    return *p == ';' || (n >= 3 && memcmp(p, "%3B", 3) == 0);
}

/* A segment that some servers resolve or drop: empty, "." or "..", also with parameters after it (";", also encoded).
 * */
static bool is_odd(const char *p, size_t n, bool last)
{
    if (n == 0)
        return !last;
    size_t name = 0;
    while (name < n && !begins_parameters(p + name, n - name))
        name++;
    return (name == 1 && p[0] == '.') || (name == 2 && p[0] == '.' && p[1] == '.');
}

struct str access_path(struct str target, char *room)
{
    static const char HEX[] = "0123456789ABCDEF";
    const struct str odd = {NULL, 0};
    const char *query = memchr(target.p, '?', target.n);
    struct str path = {target.p, query ? (uint32_t)(query - target.p) : target.n};
    if (!path.n)
        return (struct str){"/", 1};
    if (path.p[0] != '/')
        return path; /* "*": of the whole host, which no rule on paths covers */
    if (memchr(path.p, '\\', path.n))
        return odd;
    if (memchr(path.p, '%', path.n)) {
        size_t n = 0;
        for (size_t i = 0; i < path.n; i++) {
            if (path.p[i] != '%') {
                room[n++] = path.p[i];
                continue;
            }
            int high = i + 2 < path.n ? hex(path.p[i + 1]) : -1, low = high >= 0 ? hex(path.p[i + 2]) : -1;
            int c = high * 16 + low;
            if (low < 0 || c < 0x20 || c == 0x7f || c == '/' || c == '\\' || c == '%' || c == '.')
                return odd;
            i += 2;
            if (is_unreserved(c)) {
                room[n++] = (char)c;
            } else {
                room[n++] = '%';
                room[n++] = HEX[high];
                room[n++] = HEX[low];
            }
        }
        path = (struct str){room, (uint32_t)n};
    }
    for (size_t at = 1; at <= path.n;) {
        const char *slash = memchr(path.p + at, '/', path.n - at);
        size_t end = slash ? (size_t)(slash - path.p) : path.n;
        if (is_odd(path.p + at, end - at, !slash))
            return odd;
        at = end + 1;
    }
    return path;
}

static char lower(char c)
{
    return c >= 'A' && c <= 'Z' ? (char)(c + 'a' - 'A') : c;
}

/* The path as read by a server that drops parameters of segments (";", also encoded) and ignores case: in lower case,
 * without the parameters, and without segments that consist of nothing else. */
static struct str loose_path(struct str path, char *room)
{
    uint32_t n = 0;
    bool parameters = false;
    for (uint32_t i = 0; i < path.n; i++) {
        char c = path.p[i];
        if (c == '/')
            parameters = false;
        else
            parameters |= begins_parameters(path.p + i, path.n - i);
        if (!parameters && !(c == '/' && n && room[n - 1] == '/'))
            room[n++] = lower(c);
    }
    return (struct str){room, n};
}

static struct str without_slash(struct str path)
{
    if (path.n > 1 && path.p[path.n - 1] == '/')
        path.n--;
    return path;
}

/* `any_case`: the path is in lower case, the pattern in any. */
static bool path_matches(struct str pattern, struct str path, bool any_case)
{
    uint32_t i = 0, k = 0;
    while (i < pattern.n) {
        if (pattern.p[i] == '*') {
            if (i + 1 == pattern.n)
                return true;
            uint32_t start = k;
            while (k < path.n && path.p[k] != '/')
                k++;
            if (k == start)
                return false;
            i++;
        } else if (k < path.n && (any_case ? lower(pattern.p[i]) : pattern.p[i]) == path.p[k]) {
            i++;
            k++;
        } else {
            return false;
        }
    }
    return k == path.n;
}

struct search {
    const struct access *a;
    const struct access_request *r;
    bool request; /* a request, not only a connection */
    bool read;    /* path and loose are set */
    struct str path, loose;
    unsigned best, first_method;
    bool ambiguous;
    char room[H1_MAX_HEAD], loose_room[H1_MAX_HEAD];
};

static __thread struct search searching; /* too large for a stack */

/* A rule that denies or asks matches every reading of the path; one that allows, only the path as it is written. */
static bool one_path_matches(const struct search *s, const struct access_rule *rule, struct str pattern)
{
    if (path_matches(pattern, s->path, false))
        return true;
    return rule->action != ACCESS_ALLOW
        && (path_matches(pattern, s->loose, true)
            || path_matches(without_slash(pattern), without_slash(s->loose), true));
}

static bool method_matches(const struct access_rule *rule, struct str method)
{
    for (unsigned i = 0; i < rule->methods; i++)
        if (h1_same(rule->method[i], method))
            return true;
    return !rule->methods;
}

/* Considers a rule that covers the host. */
static void consider(struct search *s, unsigned number_of)
{
    const struct access_rule *rule = &s->a->rules[number_of];
    if ((rule->until_s && s->r->now_s >= rule->until_s) || (rule->ports.n && !has_port(rule->ports, s->r->port)))
        return;
    if (!s->request) {
        s->best = number_of;
        return;
    }
    if (rule->methods && number_of < s->first_method)
        s->first_method = number_of;
    if (!method_matches(rule, s->r->method))
        return;
    bool ambiguous = false, matches = !rule->paths;
    if (rule->paths) {
        if (!s->read) {
            s->path = s->r->path.n <= sizeof s->room ? access_path(s->r->path, s->room) : (struct str){NULL, 0};
            s->loose = s->path.p ? loose_path(s->path, s->loose_room) : s->path;
            s->read = true;
        }
        ambiguous = !s->path.p;
        for (unsigned i = 0; i < rule->paths && !matches && !ambiguous; i++)
            matches = one_path_matches(s, rule, rule->path[i]);
    }
    if (matches || ambiguous) {
        s->best = number_of;
        s->ambiguous = ambiguous;
    }
}

static void look_up(struct search *s, const char *name, size_t n, unsigned kind)
{
    const struct access *a = s->a;
    for (uint32_t at = a->heads[hash_of(name, n, kind) & a->mask]; at != NONE; at = a->entries[at].next) {
        const struct entry *e = &a->entries[at];
        if (e->rule >= s->best)
            return; /* chains are in the order of the rules */
        if (e->kind == kind && e->host.n == n && memcmp(e->host.p, name, n) == 0)
            consider(s, e->rule);
    }
}

/* Leaves the first rule that matches in s->best; lists are in order, so the first of each is its only candidate. */
static void find(struct search *s)
{
    const struct access *a = s->a;
    const struct host *h = s->r->host;
    s->best = s->first_method = a->n;
    look_up(s, h->text, h->len, EXACT);
    if (h->kind == HOST_NAME) {
        bool first = true;
        for (const char *dot = memchr(h->text, '.', h->len); dot; first = false) {
            const char *rest = dot + 1;
            size_t n = h->len - (size_t)(rest - h->text);
            if (first)
                look_up(s, rest, n, ONE_LABEL);
            look_up(s, rest, n, ANY_LABELS);
            dot = memchr(rest, '.', n);
        }
    }
    for (unsigned i = 0; i < a->everywhere && a->every_host[i] < s->best; i++)
        consider(s, a->every_host[i]);
}

struct access_answer access_decide(const struct access *a, const struct access_request *r)
{
    struct search *s = &searching;
    s->a = a;
    s->r = r;
    s->request = true;
    s->read = s->ambiguous = false;
    find(s);
    const struct access_rule *rule = s->best < a->n ? &a->rules[s->best] : NULL;
    return (struct access_answer){
        .action = rule ? rule->action : a->otherwise,
        .rule = rule,
        .ambiguous = s->ambiguous,
        .has_method = s->first_method < a->n && s->first_method <= s->best,
    };
}

static const struct access_rule *first_for(const struct access *a, const struct host *h, uint16_t port, int64_t now_s)
{
    struct search *s = &searching;
    struct access_request r = {.host = h, .port = port, .now_s = now_s};
    s->a = a;
    s->r = &r;
    s->request = false;
    find(s);
    return s->best < a->n ? &a->rules[s->best] : NULL;
}

enum access_look access_look(const struct access *a, const struct host *h, uint16_t port, int64_t now_s,
                             struct access_answer *first)
{
    const struct access_rule *rule = first_for(a, h, port, now_s);
    *first = (struct access_answer){.action = rule ? rule->action : a->otherwise, .rule = rule};
    bool reads = rule && (rule->methods || rule->paths || rule->until_s || rule->record != RECORD_HOST);
    if (a->observe)
        return reads ? LOOK_REQUEST : LOOK_PASS;
    return reads || first->action != ACCESS_ALLOW ? LOOK_REQUEST : LOOK_PASS;
}

bool access_names_port(const struct access *a, const struct host *h, uint16_t port, int64_t now_s)
{
    const struct access_rule *rule = first_for(a, h, port, now_s);
    return rule && rule->ports.n && rule->action != ACCESS_DENY;
}
