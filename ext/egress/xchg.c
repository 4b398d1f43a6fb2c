/* What joins a guest's request to a host's response, whichever version of HTTP either speaks. */
#define _GNU_SOURCE
#include <openssl/crypto.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "down.h"
#include "loop.h"
#include "transform.h"

enum { MAX_ASKING = 32 }; /* requests of an instance that wait for an approval */

void xchg_begin(struct xchg *x, struct conn *down, const struct head *h)
{
    if (x == &down->x) { /* a stream of HTTP/2 is new and holds its header block already */
        xchg_uncount(x);
        x->down = down;
        xchg_forget_body(x);
        echo_end(x);
        visit_end(x);
        memset(x, 0, sizeof *x);
    }
    x->down = down;
    x->active = true;
    x->started_us = down->loop->now_us;
    if (h) {
        size_t n = h->method.n < sizeof x->method - 1 ? h->method.n : sizeof x->method - 1;
        memcpy(x->method, h->method.p, n);
        x->is_head = h1_is(h->method, "head");
    }
}

bool xchg_count(struct xchg *x)
{
    x->counted = conn_take(x->down, B_STREAMS, 1);
    return x->counted;
}

void xchg_uncount(struct xchg *x)
{
    if (x->counted)
        conn_give(x->down, B_STREAMS, 1);
    x->counted = false;
}

bool xchg_gather(struct xchg *x, const char *p, size_t n)
{
    x->up_bytes += n;
    if (buf_size(&x->to_up) + n > TRANSFORM_BODY || conn_watermark(x->down) < WATERMARK) {
        /* Nothing consumes these bytes, so an instance that holds its share could not continue. */
        down_fail(x, buf_size(&x->to_up) + n > TRANSFORM_BODY ? R_TOO_LARGE : R_BUSY, NULL);
        return false;
    }
    buf_add(x->down->loop, &x->to_up, p, n);
    return true;
}

static void wipe(struct loop *l, struct buf *b)
{
    if (b->p)
        OPENSSL_cleanse(b->p, b->cap);
    buf_free(l, b);
}

static unsigned count_in(const char *p, const char *end, struct str wanted)
{
    unsigned n = 0;
    while ((p = memmem(p, (size_t)(end - p), wanted.p, wanted.n))) {
        p += wanted.n;
        n++;
    }
    return n;
}

/* Values for placeholders; R_TOO_LARGE: the body would become larger than is allowed. */
static enum reason fill_body(struct xchg *x, const struct matched *m, const struct head *h)
{
    struct loop *l = x->down->loop;
    enum content content = content_of(h);
    for (unsigned i = 0; i < m->n && content != CONTENT_OTHER && x->to_up.p; i++) {
        const struct rule *r = m->rules[i];
        struct str value = r->kind == RULE_BODY ? r->extra[content - CONTENT_JSON] : (struct str){NULL, 0};
        struct buf filled = {0};
        const char *p = x->to_up.p + x->to_up.off, *end = x->to_up.p + x->to_up.len, *at;
        if (r->kind != RULE_BODY || !value.n)
            continue;
        size_t n = count_in(p, end, r->placeholder), size = buf_size(&x->to_up) + n * value.n - n * r->placeholder.n;
        if (!n)
            continue;
        if (size > TRANSFORM_BODY)
            return R_TOO_LARGE;     /* a short placeholder, repeated, would become a thousand times as much */
        buf_need(l, &filled, size); /* all at once: no block with values is left behind unwiped */
        while ((at = memmem(p, (size_t)(end - p), r->placeholder.p, r->placeholder.n))) {
            buf_add(l, &filled, p, (size_t)(at - p));
            buf_add(l, &filled, value.p, value.n);
            p = at + r->placeholder.n;
        }
        buf_add(l, &filled, p, (size_t)(end - p));
        wipe(l, &x->to_up);
        x->to_up = filled;
    }
    return R_NONE;
}

enum { MAX_ADDED = 64 * 1024 }; /* bytes of the fields and the path that rules set for one request */
_Static_assert(SCRATCH >= H1_MAX_HEAD + MAX_ADDED + 8 * 1024, "the head of any request fits into the scratch space");

static bool added_fits(const struct matched *m)
{
    size_t n = m->path.n;
    for (unsigned i = 0; i < m->fields; i++)
        n += m->set[i].name.n + m->set[i].value.n;
    return n <= MAX_ADDED;
}

enum reason xchg_transform(struct xchg *x, const struct head *h, struct str path, struct matched *m, struct out *room)
{
    struct loop *l = x->down->loop;
    struct out work = {l->scratch, 0, SCRATCH, false};
    enum reason why = x->gathered ? fill_body(x, m, h) : R_NONE;
    if (why == R_NONE && m->transforms) {
        char *p = x->to_up.p ? x->to_up.p + x->to_up.off : "";
        struct body_text body = {x->gathered ? p : NULL, buf_size(&x->to_up)};
        why = transform(room, &work, m, h, &x->to, path, body, l->now_s);
    }
    return why == R_NONE && !added_fits(m) ? R_HEAD_TOO_LARGE : why;
}

void xchg_lost(struct conn *c)
{
    if (!c->x.active)
        return;
    up_abandon(&c->x);
    c->x.active = false;
    c->x.reason = R_CLIENT_CLOSED;
    audit_record(c->loop, c->tenant, &c->x);
}

void xchg_forget_body(struct xchg *x)
{
    wipe(x->down->loop, &x->to_up);
    buf_free(x->down->loop, &x->head);
}

void xchg_hold(struct xchg *x, enum reason why)
{
    struct loop *l = x->down->loop;
    if (!x->held) {
        x->held = true;
        if (!x->held_until_ms || x->held_for != why)
            x->held_until_ms = l->now_ms + l->timers_ms[why == R_APPROVAL_PENDING ? T_ASK : T_HELD];
        x->held_for = why;
        if (!l->held++ || x->held_until_ms < l->held_due_ms)
            l->held_due_ms = x->held_until_ms;
    }
    x->waiting = true;
    x->awaits = NULL;
}

static void copy_text(char *out, size_t cap, const char *p, size_t n)
{
    n = n < cap - 1 ? n : cap - 1;
    memcpy(out, p, n);
    out[n] = 0;
}

bool xchg_ask(struct xchg *x, struct str path)
{
    struct tenant *t = x->down->tenant;
    if (x->asked && strcmp(x->asked_rule, x->ruled.rule) != 0)
        xchg_unask(x); /* the rules changed, and another one asks */
    if (!x->asked) {
        if (atomic_fetch_add(&t->asking, 1) >= MAX_ASKING) {
            atomic_fetch_sub(&t->asking, 1);
            return false;
        }
        struct approval a = {.loop = x->down->loop->index, .port = x->to.port, .tls = x->to.tls};
        const char *query = memchr(path.p, '?', path.n);
        copy_text(a.instance, sizeof a.instance, t->instance, strlen(t->instance));
        copy_text(a.host, sizeof a.host, x->to.host.text, x->to.host.len);
        copy_text(a.method, sizeof a.method, x->method, strlen(x->method));
        copy_text(a.rule, sizeof a.rule, x->ruled.rule, strlen(x->ruled.rule));
        copy_text(a.path, sizeof a.path, path.p, query ? (size_t)(query - path.p) : path.n);
        x->approved = false;
        x->asked = true;
        strcpy(x->asked_rule, x->ruled.rule);
        x->approval = engine_ask_approval(x->down->loop->engine, &a);
    }
    xchg_hold(x, R_APPROVAL_PENDING);
    return true;
}

void xchg_unask(struct xchg *x)
{
    if (x->asked)
        atomic_fetch_sub(&x->down->tenant->asking, 1);
    x->asked = false;
}

static bool decide_held(struct loop *l, struct xchg *x, uint64_t token, bool allow)
{
    if (!x->asked || x->approval != token)
        return false;
    xchg_unask(x);
    x->approved = allow;
    if (!x->held) /* the rules have just changed: it is about to be decided again, and asks again if this was a denial */
        return true;
    x->held = x->waiting = false;
    if (!x->active)
        return true;
    l->payer = x->down->tenant;
    if (allow)
        x->down->side->resume(x);
    else
        down_fail(x, R_NOT_APPROVED, NULL);
    l->payer = NULL;
    return true;
}

/* The first exchange of a guest's connection; of one without a request so far it is blank. */
static struct xchg *first_of(struct conn *c)
{
    return c->dead || c->kind != DOWN ? NULL : c->h2 ? c->streams : &c->x;
}

void held_decided(struct loop *l, uint64_t token, bool allow)
{
    for (struct conn *c = l->all; c; c = c->all_next)
        for (struct xchg *x = first_of(c); x; x = x->next)
            if (decide_held(l, x, token, allow))
                return;
}

static void decide_again(struct loop *l, struct xchg *x, bool rules_changed)
{
    bool late = x->held_until_ms <= l->now_ms;
    if (!x->held)
        return;
    if (!late && !rules_changed) {
        if (!l->held++ || x->held_until_ms < l->held_due_ms)
            l->held_due_ms = x->held_until_ms;
        return;
    }
    x->held = x->waiting = false;
    if (!x->active)
        return;
    l->payer = x->down->tenant;
    if (late)
        down_fail(x, x->held_for, NULL);
    else
        x->down->side->resume(x);
    l->payer = NULL;
}

void held_again(struct loop *l, bool rules_changed)
{
    struct conn *next;
    struct xchg *after;
    if (!l->held)
        return;
    l->held = 0;
    for (struct conn *c = l->all; c; c = next) {
        next = c->all_next;
        for (struct xchg *x = first_of(c); x; x = after) {
            after = x->next;
            decide_again(l, x, rules_changed);
        }
    }
}

enum reason xchg_decide(struct xchg *x, const struct head *h, struct str path, struct matched *m, struct snapshot **s,
                        uint64_t *generation)
{
    const struct conn *c = x->down;
    enum reason why = c->refused ? c->refused : h->expect_other ? R_EXPECTATION : check_hops(h);
    if (why != R_NONE)
        return why;
    *s = tenant_borrow(c->tenant, generation);
    if (!*s)
        return R_UNREGISTERED;
    return decide_request(*s, h, &x->to, path, c->loop->now_s, x->approved ? x->asked_rule : NULL, &x->ruled, m);
}

void xchg_note_rules(struct xchg *x, struct snapshot *s, const struct matched *m)
{
    x->down->loop->counters[M_INJECTED] += m->n > 0;
    echo_begin(x, s, m);
    struct out o = {x->keys, 0, sizeof x->keys - 1, false};
    x->injected = (uint8_t)m->n;
    for (unsigned i = 0; i < m->n && !o.over; i++) {
        if (i)
            out_add(&o, ",", 1);
        out_add(&o, m->rules[i]->key.p, m->rules[i]->key.n);
    }
    x->keys[o.n] = 0;
}

void down_head(struct xchg *x, const struct head *h, enum body body, uint64_t length)
{
    if (x->down && x->echo)
        echo_head(x, h, body, length);
    else if (x->down)
        down_pass_head(x, h, body, length);
}

void down_pass_head(struct xchg *x, const struct head *h, enum body body, uint64_t length)
{
    if (h->status >= 200 || h->status == 101) {
        x->resp_started = true;
        x->status = h->status;
    }
    x->down->side->head(x, h, body, length);
}

void down_data(struct xchg *x, const char *p, size_t n)
{
    x->down_bytes += n;
    if (x->down && x->echo)
        echo_data(x, p, n);
    else if (x->down)
        x->down->side->data(x, p, n);
}

void down_end(struct xchg *x, const struct head *trailers)
{
    x->resp_done = true;
    if (x->down && x->echo)
        echo_finish(x, trailers);
    else if (x->down)
        x->down->side->end(x, trailers);
}

static void out_json(struct out *o, const char *text)
{
    for (; *text; text++) {
        char c =
            *text == '"' || *text == '\\' || (unsigned char)*text < 0x20 || (unsigned char)*text > 0x7e ? ' ' : *text;
        out_add(o, &c, 1);
    }
}

/* RFC 9457 */
static size_t problem_body(char *out, size_t cap, const struct xchg *x, enum reason why, const char *detail)
{
    static const char *const NEXT[] = {
        [NEXT_NEVER] = "never_retry", [NEXT_APPROVAL] = "retry_after_approval", [NEXT_OTHER_HOST] = "use_another_host",
        [NEXT_LATER] = "retry_later", [NEXT_CHANGE] = "change_the_request",
    };
    const struct reason_text *r = &REASONS[why];
    struct out o = {out, 0, cap, false};
    if (r->status < 400)
        return 0; /* an answer, not an error */
    out_text(&o, "{\"type\":\"urn:hypeman:egress:");
    out_text(&o, r->code);
    out_text(&o, "\",\"title\":\"");
    out_text(&o, r->message);
    out_text(&o, "\",\"status\":");
    out_number(&o, (uint64_t)r->status);
    if (detail && *detail) {
        out_text(&o, ",\"detail\":\"");
        out_json(&o, detail);
        out_text(&o, "\"");
    }
    out_text(&o, ",\"code\":\"");
    out_text(&o, r->code);
    out_text(&o, "\",\"next\":\"");
    out_text(&o, NEXT[r->next]);
    out_text(&o, "\"");
    if (x->to.host.kind != HOST_INVALID) {
        out_text(&o, ",\"requested\":{\"scheme\":\"");
        out_text(&o, x->to.tls ? "https" : "http");
        out_text(&o, "\",\"host\":\"");
        out_json(&o, x->to.host.text);
        out_text(&o, "\",\"port\":");
        out_number(&o, x->to.port);
        out_text(&o, ",\"method\":\"");
        out_json(&o, x->method);
        out_text(&o, "\"}");
    }
    if (x->ruled.decision == D_DENIED || x->ruled.decision == D_HELD) {
        out_text(&o, ",\"rule\":\"");
        out_json(&o, x->ruled.rule);
        out_text(&o, "\"");
    }
    out_text(&o, "}\n");
    return o.over ? 0 : o.n;
}

void failure_page(struct page *p, const struct xchg *x, enum reason why, const char *detail)
{
    const struct visit *v = x->visit;
    if (x->down->front) {
        page_of(p, why, v && v->html, v ? v->location : NULL, v ? v->proof : NULL);
        return;
    }
    p->status = REASONS[why].status;
    p->title = REASONS[why].code;
    p->type = "application/problem+json";
    p->n_fields = 0;
    page_add(p, "X-Hypeman-Egress", REASONS[why].code);
    if (why == R_RATE || why == R_BUSY || why == R_CREDENTIAL)
        page_add(p, "Retry-After", "1");
    p->n = problem_body(p->body, sizeof p->body, x, why, detail);
}

void down_fail(struct xchg *x, enum reason why, const char *detail)
{
    struct conn *down = x->down;
    if (!x->active || !down)
        return;
    up_abandon(x);
    bool told = !x->resp_started;
    x->reason = why;
    x->waiting = false;
    if (told)
        x->status = REASONS[why].status;
    x->resp_done = true;
    if (!down->front) {
        down->loop->denied[why]++;
        if (REASONS[why].status < 500)
            down->loop->counters[M_DENIED]++;
    }
    down->side->fail(x, why, detail, told);
}

bool down_wants_room(struct xchg *x)
{
    return x->down && x->down->side->full(x);
}

void up_data(struct xchg *x, const char *p, size_t n)
{
    x->up_bytes += n;
    if (x->up)
        x->up->side->data(x, p, n);
}

void up_end(struct xchg *x, const struct head *trailers)
{
    x->req_done = true;
    if (x->up)
        x->up->side->end(x, trailers);
}

/* The response is no longer wanted. An HTTP/1 connection in the middle of one is of no further use. */
void up_abandon(struct xchg *x)
{
    struct conn *up = x->up;
    xchg_unask(x);
    if (x->waiting)
        up_unwait(x);
    x->up = NULL;
    if (up)
        up->side->abandon(up, x);
}

void xchg_try_finish(struct xchg *x)
{
    if (!x->active || !x->req_done || !x->resp_done)
        return;
    struct conn *up = x->up;
    x->up = NULL;
    if (up)
        up->side->release(up, x);
    echo_end(x);
    x->active = false;
    if (x == &x->down->x) /* a stream of HTTP/2 counts until the client has taken the response */
        xchg_uncount(x);
    audit_record(x->down->loop, x->down->tenant, x);
    x->down->side->finished(x);
}

void conn_drained(struct conn *c)
{
    c->side->pump(c);
}

void conn_lost(struct conn *c)
{
    if (c->dead)
        return;
    if (c->phase == P_SPLICE || c->phase == P_TUNNEL || (c->peer && c->phase != P_LINGER)) {
        struct conn *down = c->kind == DOWN ? c : c->peer;
        if (down && down->x.active) {
            down->x.active = false;
            down->x.reason = c->kind == DOWN ? R_CLIENT_CLOSED : R_UPSTREAM_CLOSED;
            audit_record(c->loop, down->tenant, &down->x);
        }
        conn_kill(c);
        return;
    }
    if (c->kind == UP) {
        c->side->lost(c);
        return;
    }
    up_unpass(c);
    c->side->lost(c);
    conn_kill(c);
}
