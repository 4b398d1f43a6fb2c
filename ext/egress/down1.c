/* The guest's side in HTTP/1: one request after the other. Requests sent ahead stay in the buffer, unread, until
 * the response before them is written.
 *
 * A head is decided when it is about to be written upstream. If a connection must be opened first, the head stays
 * unconsumed in the buffer and is parsed and decided again when that connection is ready: so a credential that was
 * rotated meanwhile is used, and nothing is copied where there is no wait.
 */
#define _GNU_SOURCE
#include "down.h"

#include <openssl/crypto.h>
#include <stdio.h>
#include <string.h>

#include "loop.h"
#include "transform.h"

static void add_trailers(struct out *o, const struct head *trailers, const struct matched *m)
{
    for (unsigned i = 0; trailers && i < trailers->n; i++)
        if (trailer_passes(&trailers->f[i], m))
            out_field(o, trailers->f[i].name, trailers->f[i].value);
}

static void write_last_chunk(struct conn *c, const struct head *trailers, const struct matched *m)
{
    struct out o = {c->loop->scratch, 0, SCRATCH, false};
    out_text(&o, "0\r\n");
    add_trailers(&o, trailers, m);
    out_text(&o, "\r\n");
    conn_write(c, o.p, o.n);
}

static void down1_head(struct xchg *x, const struct head *h, enum body body, uint64_t length)
{
    struct conn *c = x->down;
    bool interim = h->status < 200;
    bool old = x->old_client;
    if (interim && h->status != 101 && old)
        return;
    if (x->kept_head) { /* no more retries */
        buf_take(c->loop, &c->in, x->kept_head);
        x->kept_head = 0;
    }
    struct out o = {c->loop->scratch, 0, SCRATCH, false};
    out_text(&o, "HTTP/1.1 ");
    out_number(&o, (uint64_t)h->status);
    out_add(&o, " ", 1);
    out_add(&o, h->reason.p, h->reason.n);
    out_add(&o, "\r\n", 2);
    for (unsigned i = 0; i < h->n; i++)
        if (response_field_passes(h, &h->f[i]))
            out_field(&o, h->f[i].name, h->f[i].value);
    if (!c->front)
        out_via(&o, h->http2 ? 2 : h->minor);
    if (h->status == 101) {
        for (unsigned i = 0; i < h->n; i++)
            if (h->f[i].id == F_UPGRADE)
                out_field(&o, h->f[i].name, h->f[i].value);
        out_text(&o, "Connection: upgrade\r\n");
    } else if (!interim) {
        x->down_chunked = false;
        if (body == BODY_LENGTH) {
            out_text(&o, "Content-Length: ");
            out_number(&o, length);
            out_add(&o, "\r\n", 2);
        } else if (body != BODY_NONE && !old) {
            x->down_chunked = true;
            out_text(&o, "Transfer-Encoding: chunked\r\n");
        } else if (body != BODY_NONE) {
            x->closing = true;
        }
        if (c->loop->draining)
            x->closing = true;
        if (x->closing)
            out_text(&o, "Connection: close\r\n");
        else if (old)
            out_text(&o, "Connection: keep-alive\r\n");
    }
    out_add(&o, "\r\n", 2);
    conn_write(c, o.p, o.n);
}

static void down1_data(struct xchg *x, const char *p, size_t n)
{
    if (x->half)
        conn_timer(x->down, T_HALF);
    if (x->down_chunked)
        conn_write_chunks(x->down, p, n);
    else
        conn_write(x->down, p, n);
}

static void down1_end(struct xchg *x, const struct head *trailers)
{
    if (x->down_chunked)
        write_last_chunk(x->down, trailers, NULL);
}

static void down1_finished(struct xchg *x)
{
    struct conn *c = x->down;
    c->h1 = H1_HEAD;
    c->head_timer = false;
    if (x->closing || x->half) {
        bool unread = !x->req_complete || buf_size(&c->in);
        conn_finish(c, unread);
        return;
    }
    conn_timer(c, T_IDLE_DOWN);
    if (buf_size(&c->in) || !c->drained)
        conn_again(c);
}

static void down1_fail(struct xchg *x, enum reason why, const char *detail, bool told)
{
    struct conn *c = x->down;
    struct page p;
    bool complete = x->req_body == BODY_NONE || x->req_done;
    if (!told) { /* the rest of the response is missing: no proper end, so that the client notices */
        x->active = false;
        audit_record(c->loop, c->tenant, x);
        if (!c->ssl)
            socket_reset(c->fd);
        conn_kill(c);
        return;
    }
    if (x->kept_head) {
        buf_take(c->loop, &c->in, x->kept_head);
        x->kept_head = 0;
    }
    complete |= x->gathered;
    x->gathering = false;
    xchg_forget_body(x);
    if (!complete || c->loop->draining || why == R_BAD_REQUEST || why == R_HEAD_TOO_LARGE || why == R_BAD_HOST)
        x->closing = true; /* where the next request begins is not certain, or far away */
    failure_page(&p, x, why, detail);
    struct out o = {c->loop->scratch, 0, SCRATCH, false};
    out_text(&o, "HTTP/1.1 ");
    out_number(&o, (uint64_t)p.status);
    out_add(&o, " ", 1);
    out_text(&o, p.title);
    out_text(&o, "\r\nContent-Type: ");
    out_text(&o, p.type);
    out_text(&o, "\r\nContent-Length: ");
    out_number(&o, p.n);
    out_add(&o, "\r\n", 2);
    for (unsigned i = 0; i < p.n_fields; i++)
        out_field(&o, str_of(p.fields[i].name), str_of(p.fields[i].value));
    out_text(&o, x->closing ? "Connection: close\r\n" : x->old_client ? "Connection: keep-alive\r\n" : "");
    out_add(&o, "\r\n", 2);
    if (!x->is_head)
        out_add(&o, p.body, p.n);
    conn_write(c, o.p, o.n);
    x->req_complete = complete;
    x->req_done = x->resp_done = true;
    xchg_try_finish(x);
}

static void note_request(struct conn *c, const struct head *h)
{
    struct xchg *x = &c->x;
    xchg_begin(x, c, h);
    x->old_client = h->minor == 0;
    x->closing = h->connection_close || (x->old_client && !h->connection_keep_alive);
    x->req_body = h->chunked ? BODY_CHUNKED : h->content_length >= 0 ? BODY_LENGTH : BODY_NONE;
    x->req_left = h->content_length > 0 ? (uint64_t)h->content_length : 0;
    if (x->req_body == BODY_LENGTH && !x->req_left)
        x->req_done = true;
    x->upgrade = may_upgrade(h);
    x->half = false;
    c->loop->counters[M_REQUESTS] += !c->front;
}

static enum step refuse(struct conn *c, enum reason why, size_t used, const char *detail)
{
    c->x.kept_head = used;
    down_fail(&c->x, why, detail);
    return c->dead ? STEP_STOP : STEP_AGAIN;
}

/* The body must be complete before the head is decided again: the head is stored meanwhile. */
static enum step gather(struct conn *c, const struct head *h, size_t used)
{
    struct xchg *x = &c->x;
    bool asks = h->expect_continue;
    if (h->content_length > TRANSFORM_BODY)
        return refuse(c, R_TOO_LARGE, used, NULL);
    buf_add(c->loop, &x->head, c->in.p + c->in.off, used);
    buf_take(c->loop, &c->in, used);
    x->kept_head = 0;
    x->gathering = true;
    c->h1 = H1_BODY;
    conn_timer(c, T_HALF);
    if (asks)
        conn_write(c, "HTTP/1.1 100 Continue\r\n\r\n", 25);
    return STEP_AGAIN;
}

static enum step gathered(struct conn *c)
{
    c->x.gathering = false;
    c->x.gathered = true;
    c->h1 = H1_HEAD;
    conn_timer(c, -1);
    return STEP_AGAIN;
}

/* A guest's request by the rules of its instance. R_NONE, with the rules that apply in *m, borrowed from *s. */
static enum reason mediate(struct conn *c, const struct head *h, struct str *path, struct matched *m,
                           struct snapshot **s, uint64_t *generation)
{
    struct xchg *x = &c->x;
    struct origin from = {c->ssl ? &c->to : NULL, c->explicit_proxy, c->dialled_port};
    enum reason why = target_of_h1(h, &from, &x->to, path);
    return why == R_NONE ? xchg_decide(x, h, *path, m, s, generation) : why;
}

static enum step on_head(struct conn *c, const struct head *h, size_t used)
{
    struct xchg *x = &c->x;
    struct loop *l = c->loop;
    const struct limits *limits = &l->engine->table.limits;
    bool resumed = x->active;
    if (!resumed) {
        if (!c->ssl && c->explicit_proxy && !c->connected && h1_is(h->method, "connect"))
            return down_connect(c, h, used) ? STEP_STOP : STEP_AGAIN;
        note_request(c, h);
        conn_timer(c, -1);
        if (!c->front && !tenant_may_request(c->tenant, limits, l->now_us))
            return refuse(c, R_RATE, used, NULL);
        if (!xchg_count(x))
            return refuse(c, R_BUSY, used, NULL);
    }
    struct str path;
    struct matched m = {0};
    struct snapshot *s = NULL;
    uint64_t generation;
    enum reason why = c->front ? front_decide(x, h, &path, &generation) : mediate(c, h, &path, &m, &s, &generation);
    if (why == R_APPROVAL_PENDING) {
        snapshot_release(s);
        if (!xchg_ask(x, path))
            return refuse(c, R_BUSY, used, NULL);
        x->kept_head = used;
        return STEP_STOP;
    }
    xchg_unask(x);
    if (why == R_NONE && m.unready) {
        snapshot_release(s);
        x->kept_head = used;
        xchg_hold(x, R_CREDENTIAL);
        return STEP_STOP;
    }
    if (why != R_NONE) {
        snapshot_release(s);
        return refuse(c, why, used, m.detail);
    }
    if (m.transforms && !x->gathered && transform_needs_body(&m, h, path)) {
        snapshot_release(s);
        return gather(c, h, used);
    }
    if (x->up && x->up->generation != generation && !c->front) {
        if (x->up->served || x->up->certified || m.certified) {
            struct conn *old = x->up;
            x->up = NULL;
            old->one = NULL;
            conn_kill(old);
        } else {
            x->up->generation = generation; /* opened under the old rules, but nothing was sent on it */
        }
    }
    enum take taken = x->up ? TAKE_READY : up_take(x, generation, false, x->retried);
    if (taken != TAKE_READY) {
        snapshot_release(s);
        if (taken == TAKE_FULL)
            return refuse(c, R_BUSY, used, NULL);
        x->kept_head = used;
        return STEP_STOP;
    }
    struct out room = {l->room, 0, TRANSFORM_ROOM, false};
    why = xchg_transform(x, h, path, &m, &room);
    if (why != R_NONE) {
        OPENSSL_cleanse(room.p, room.n);
        snapshot_release(s);
        return refuse(c, why, used, m.detail);
    }
    if (x->gathered) {
        x->req_body = BODY_LENGTH;
        x->req_left = buf_size(&x->to_up);
    }
    xchg_note_rules(x, s, &m);
    x->upgrade &= !x->echo; /* what follows an upgrade cannot be searched */
    struct request_line line = {path, x->req_body, x->req_left, x->upgrade};
    up1_send(x, h, &line, &m);
    OPENSSL_cleanse(room.p, room.n);
    snapshot_release(s);
    if (x->gathered) {
        if (x->req_left)
            x->up->side->data(x, x->to_up.p + x->to_up.off, (size_t)x->req_left);
        x->req_left = 0;
        x->req_done = true;
        xchg_forget_body(x);
    }
    x->retriable = x->reused && !x->retried && x->req_body == BODY_NONE && !x->upgrade && is_idempotent(h);
    x->kept_head = 0;
    if (x->retriable)
        x->kept_head = used;
    else
        buf_take(l, &c->in, used);
    if (x->req_body == BODY_NONE || x->req_done) {
        x->req_done = x->req_complete = true;
        c->h1 = H1_WAIT;
    } else {
        c->h1 = H1_BODY;
    }
    return STEP_AGAIN;
}

static enum step read_head(struct conn *c)
{
    struct head *h = &c->loop->head;
    const struct buf *from = buf_size(&c->x.head) ? &c->x.head : &c->in;
    size_t n = buf_size(from);
    if (c->x.active && c->x.waiting)
        return STEP_STOP;
    if (!c->x.active && conn_wants_room(c))
        return STEP_STOP; /* requests sent ahead, by a client that does not read the answers */
    if (n == 0)
        return STEP_MORE;
    int used = h1_parse_request(from->p + from->off, n, h);
    if (used == 0) {
        if (!c->head_timer) {
            c->head_timer = true;
            conn_timer(c, T_HEAD);
        }
        return STEP_MORE;
    }
    if (used < 0) {
        xchg_begin(&c->x, c, NULL);
        c->x.closing = true;
        c->x.req_body = BODY_CLOSE; /* there may be more of it: linger */
        down_fail(&c->x, used == H1_TOO_LARGE ? R_HEAD_TOO_LARGE : R_BAD_REQUEST, NULL);
        return STEP_STOP;
    }
    return on_head(c, h, from == &c->in ? (size_t)used : 0);
}

static void request_done(struct conn *c)
{
    struct xchg *x = &c->x;
    c->h1 = H1_WAIT;
    x->req_done = x->req_complete = true;
    xchg_try_finish(x);
}

static bool take_body(struct xchg *x, const char *p, size_t n)
{
    if (x->gathering)
        return xchg_gather(x, p, n);
    up_data(x, p, n);
    return true;
}

static enum step read_body(struct conn *c)
{
    struct xchg *x = &c->x;
    struct loop *l = c->loop;
    size_t n = buf_size(&c->in);
    if (n == 0)
        return STEP_MORE;
    if (x->in_trailers) {
        struct head *t = &l->head;
        int used = h1_parse_trailers(c->in.p + c->in.off, n, t);
        if (used == 0)
            return STEP_MORE;
        if (used < 0) {
            x->closing = true;
            down_fail(x, R_BAD_REQUEST, NULL);
            return STEP_STOP;
        }
        if (!x->gathering)
            up_end(x, t); /* before the bytes that it points into are consumed */
        buf_take(l, &c->in, (size_t)used);
        if (x->gathering)
            return gathered(c);
        request_done(c);
        return STEP_AGAIN;
    }
    if (x->up && conn_wants_room(x->up))
        return STEP_STOP;
    if (x->req_body == BODY_LENGTH) {
        size_t part = n < x->req_left ? n : (size_t)x->req_left;
        x->req_left -= part;
        if (!take_body(x, c->in.p + c->in.off, part))
            return STEP_STOP;
        buf_take(l, &c->in, part);
        if (!x->req_left && x->gathering)
            return gathered(c);
        if (!x->req_left) {
            up_end(x, NULL);
            request_done(c);
        }
        return STEP_AGAIN;
    }
    size_t used = 0;
    struct str data;
    enum h1_chunk_event e = h1_chunked_next(&x->req_chunks, c->in.p + c->in.off, n, &used, &data);
    if (e == H1_CHUNK_DATA && !take_body(x, data.p, data.n))
        return STEP_STOP;
    if (e == H1_CHUNK_BAD) {
        x->closing = true;
        down_fail(x, R_BAD_REQUEST, NULL);
        return STEP_STOP;
    }
    buf_take(l, &c->in, used);
    x->in_trailers = e == H1_CHUNK_TRAILERS;
    return STEP_AGAIN;
}

static bool full(struct xchg *x)
{
    return conn_wants_room(x->down);
}

static void again(struct xchg *x)
{
    x->down->h1 = H1_HEAD; /* its head is still in the buffer */
}

static void resume(struct xchg *x)
{
    conn_again(x->down);
}

static void pump(struct conn *c)
{
    if (c->x.up)
        conn_again(c->x.up);
}

const struct side DOWN1 = {
    .head = down1_head,
    .fail = down1_fail,
    .finished = down1_finished,
    .again = again,
    .full = full,
    .data = down1_data,
    .end = down1_end,
    .resume = resume,
    .pump = pump,
    .lost = xchg_lost,
};

static void client_ended(struct conn *c)
{
    if (c->h1 == H1_HEAD && !c->x.active && !buf_size(&c->out)) {
        conn_kill(c); /* the ordinary end of a connection */
        return;
    }
    conn_lost(c);
}

void down1_run(struct conn *c)
{
    for (unsigned turns = 0; turns < 256; turns++) {
        enum step s = STEP_STOP;
        if (c->dead || c->phase != P_HTTP1 || c->close_after)
            return;
        if (c->h1 == H1_HEAD)
            s = read_head(c);
        else if (c->h1 == H1_BODY)
            s = read_body(c);
        if (s == STEP_AGAIN)
            continue;
        if (c->dead || c->phase != P_HTTP1)
            return;
        if (s == STEP_STOP) {
            if (c->hung_up)
                conn_lost(c);
            else if (c->readable_end && c->x.active && c->h1 == H1_WAIT && c->front) {
                conn_lost(c); /* nobody waits for the response any more */
            } else if (c->readable_end && c->x.active && c->h1 == H1_WAIT && !c->x.half) {
                c->x.half = true; /* it may still read: give the response a limited time */
                conn_timer(c, T_HALF);
            }
            return;
        }
        ssize_t n = conn_read(c);
        if (n == 0)
            return;
        if (n < 0) {
            client_ended(c);
            return;
        }
        if (c->h1 == H1_BODY && c->x.up)
            up_timer(c->x.up);
        else if (c->x.gathering)
            conn_timer(c, T_HALF);
    }
    conn_again(c);
}
