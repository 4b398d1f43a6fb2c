/* See login.h. */
#define _GNU_SOURCE
#include "login.h"

#include <stdio.h>
#include <string.h>

void login_begin(struct conn *c, const char *method)
{
    struct xchg *x = &c->x;
    xchg_begin(x, c, NULL);
    (void)snprintf(x->method, sizeof x->method, "%s", method);
    x->to = c->to;
    c->loop->counters[M_REQUESTS]++;
}

enum reason login_within_limits(struct conn *c)
{
    if (!tenant_may_request(c->tenant, &c->loop->engine->table.limits, c->loop->now_us))
        return R_RATE;
    return xchg_count(&c->x) ? R_NONE : R_BUSY;
}

enum reason login_allowed(const struct conn *c, const struct login *l, const struct snapshot *s, struct ruled *out)
{
    const struct xchg *x = &c->x;
    struct head *h = &c->loop->head; /* without fields: no rule on paths covers it, and one on methods can name it */
    h->n = 0;
    h->method = str_of(l->method);
    return apply_access(s, h, &x->to, str_of("*"), c->loop->now_s, x->approved ? x->asked_rule : NULL, out);
}

enum reason login_find(struct conn *c, const struct login *l, const struct snapshot *s, const struct rule **rule)
{
    struct xchg *x = &c->x;
    if (!snapshot_logs_in(s, l->kind, &x->to.host, x->to.port))
        return R_HOST_DENIED;
    const struct rule *r = snapshot_login(s, l->kind, &x->to.host, x->to.port, str_of(l->user), str_of(l->database));
    if (!r)
        return R_LOGIN_USER;
    size_t n = r->key.n < sizeof x->keys - 1 ? r->key.n : sizeof x->keys - 1;
    memcpy(x->keys, r->key.p, n);
    x->keys[n] = 0;
    x->to.tls = !r->extra[LOGIN_PLAIN].n;
    *rule = r;
    return R_NONE;
}

enum reason login_decide(struct conn *c, const struct login *l, uint64_t *generation)
{
    const struct rule *r;
    struct snapshot *s = tenant_borrow(c->tenant, generation);
    if (!s)
        return R_UNREGISTERED;
    enum reason access = login_allowed(c, l, s, &c->x.ruled), why = R_NONE;
    if (access != R_NONE && access != R_APPROVAL_PENDING)
        why = access;
    if (why == R_NONE)
        why = login_find(c, l, s, &r);
    if (why == R_NONE)
        why = access != R_NONE ? access : rule_is_ready(r, c->loop->now_s) ? R_NONE : R_CREDENTIAL;
    snapshot_release(s);
    return why;
}

bool login_may_go_on(const struct conn *c, const struct login *l, const struct snapshot *s)
{
    struct ruled now;
    const struct destination *to = &c->x.to;
    const struct rule *r = snapshot_login(s, l->kind, &to->host, to->port, str_of(l->user), str_of(l->database));
    return r && (to->tls || r->extra[LOGIN_PLAIN].n) && login_allowed(c, l, s, &now) == R_NONE;
}

bool login_only_host(struct conn *c, const struct login *l, const char *user)
{
    uint64_t generation;
    struct snapshot *s = tenant_borrow(c->tenant, &generation);
    const struct pattern *p = s ? snapshot_login_host(s, l->kind, c->to.port, user) : NULL;
    if (p)
        (void)host_canonical(p->host.p, p->host.n, false, &c->to.host);
    snapshot_release(s);
    return p != NULL;
}

bool login_possible(const struct conn *c, enum rule_kind kind)
{
    uint64_t generation;
    struct snapshot *s = tenant_borrow(c->tenant, &generation);
    bool found = s && snapshot_logs_in(s, kind, &c->to.host, c->to.port);
    snapshot_release(s);
    return found;
}

const struct rule *login_password_rule(struct conn *up, const struct login *l, struct snapshot **s)
{
    const struct rule *r = NULL;
    struct conn *c = up->one->down;
    uint64_t generation;
    *s = tenant_borrow(c->tenant, &generation);
    enum reason why = *s ? login_find(c, l, *s, &r) : R_UNREGISTERED;
    if (why == R_NONE && !rule_is_ready(r, up->loop->now_s))
        why = R_CREDENTIAL;
    if (why == R_NONE && c->x.to.tls && !up->ssl)
        why = R_UPSTREAM_TLS; /* it demands TLS since */
    if (why == R_NONE)
        return r;
    snapshot_release(*s);
    up_failed(up, why, NULL);
    return NULL;
}

void login_note_use(struct conn *up)
{
    up->one->injected = 1;
    up->loop->counters[M_INJECTED]++;
}

enum step login_give_up(struct conn *up, enum reason why, const char *detail)
{
    up_failed(up, why, detail);
    return STEP_STOP;
}

void login_run(struct conn *c, enum phase phase, enum step (*one_step)(struct conn *c))
{
    for (;;) {
        if (c->dead || c->phase != phase || c->close_after)
            return;
        enum step s = one_step(c);
        if (s == STEP_AGAIN)
            continue;
        if (s == STEP_STOP)
            return;
        ssize_t n = conn_read(c);
        if (n == 0)
            return;
        if (n < 0) {
            conn_lost(c);
            return;
        }
    }
}

const char *login_hint(enum reason why)
{
    static const char *const HINTS[] = {
        [NEXT_NEVER] = "never_retry: the outcome will be the same.",
        [NEXT_APPROVAL] = "retry_after_approval: somebody has to approve it.",
        [NEXT_OTHER_HOST] = "use_another_host: this one is not allowed.",
        [NEXT_LATER] = "retry_later: it may succeed then.",
        [NEXT_CHANGE] = "change_the_request: it cannot succeed as it is.",
    };
    return HINTS[REASONS[why].next];
}
