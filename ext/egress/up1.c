/* The host's side in HTTP/1: writes one request, reads its response, then waits in the pool for the next. */
#define _GNU_SOURCE
#include <openssl/crypto.h>
#include <linux/sockios.h>
#include <string.h>
#include <sys/ioctl.h>

#include "down.h"
#include "loop.h"

void up1_send(struct xchg *x, const struct head *h, const struct request_line *line, const struct matched *m)
{
    struct conn *c = x->up;
    struct out o = {c->loop->scratch, 0, SCRATCH, false};
    if (c->front) {
        struct forwarded from = front_forwarded(x, h);
        render_forward(&o, h, line, &from);
    } else {
        render_request(&o, h, line, &x->to, m);
    }
    c->r1 = R1_HEAD;
    c->served = true;
    c->spent = body_is_undefined(h, line);
    x->matched_trailers = m->n > 0;
    if (m->n) {
        (void)conn_secret(c, o.p, o.n);
        OPENSSL_cleanse(o.p, o.n);
    } else {
        conn_write(c, o.p, o.n);
    }
    up_timer(c);
}

static void up1_data(struct xchg *x, const char *p, size_t n)
{
    struct conn *c = x->up;
    if (x->req_body == BODY_CHUNKED)
        conn_write_chunks(c, p, n);
    else
        conn_write(c, p, n);
}

static void up1_end(struct xchg *x, const struct head *trailers)
{
    if (x->req_body != BODY_CHUNKED)
        return;
    struct out o = {x->up->loop->scratch, 0, SCRATCH, false};
    out_text(&o, "0\r\n");
    for (unsigned i = 0; trailers && !x->matched_trailers && i < trailers->n; i++)
        if (x->visit ? forward_trailer_passes(&trailers->f[i], x->visit->route)
                     : trailer_passes(&trailers->f[i],
                                      NULL)) /* to hosts with a credential no trailers: one could repeat its name */
            out_field(&o, trailers->f[i].name, trailers->f[i].value);
    out_text(&o, "\r\n");
    conn_write(x->up, o.p, o.n);
}

/* Body bytes of a stream, as far as there is room. */
static void resume(struct xchg *x)
{
    struct conn *c = x->up;
    while (buf_size(&x->to_up) && !conn_wants_room(c)) {
        size_t n = buf_size(&x->to_up) < RECORD ? buf_size(&x->to_up) : RECORD;
        up1_data(x, x->to_up.p + x->to_up.off, n);
        buf_take(c->loop, &x->to_up, n);
        down2_grant(x, n);
        up_timer(c);
    }
    if (!buf_size(&x->to_up) && x->req_complete && !x->req_done) {
        up1_end(x, x->up_trailers.head);
        x->req_done = true;
    }
}

static void abandon(struct conn *c, struct xchg *x)
{
    (void)x; /* in the middle of a response it is of no further use */
    c->one = NULL;
    conn_kill(c);
}

static void release(struct conn *c, struct xchg *x)
{
    (void)x;
    c->one = NULL;
    up_release(c);
}

static void pump(struct conn *c)
{
    struct xchg *x = c->one;
    if (!x || !x->down)
        return;
    if (x->down->h2) { /* its body is in the stream's own buffer */
        resume(x);
        xchg_try_finish(x);
    } else {
        conn_again(x->down);
    }
}

static void lost(struct conn *c)
{
    up_failed(c, R_UPSTREAM_CLOSED, NULL);
}

const struct side UP1 = {
    .abandon = abandon,
    .release = release,
    .data = up1_data,
    .end = up1_end,
    .resume = resume,
    .pump = pump,
    .lost = lost,
};

static enum step bad_response(struct conn *c)
{
    up_failed(c, R_UPSTREAM_RESPONSE, NULL);
    return STEP_STOP;
}

static enum step response_done(struct conn *c, const struct head *trailers)
{
    struct xchg *x = c->one;
    down_end(x, trailers);
    if (!x->req_done && !c->keep)
        up_ended_early(x);
    else
        xchg_try_finish(x);
    return STEP_STOP;
}

/* Whether the host may have answered before it read all of a body that we sent. What it leaves unread it may take for
 * the next request. */
static bool may_be_unread(const struct conn *c)
{
    const struct xchg *x = c->one;
    int unsent = 0;
    if (!x->req_done)
        return true;
    if (x->req_body == BODY_NONE || !x->up_bytes)
        return false;
    return buf_size(&c->out) || buf_size(&c->stage) || (ioctl(c->fd, SIOCOUTQ, &unsent) == 0 && unsent > 0);
}

static enum step read_head(struct conn *c)
{
    struct xchg *x = c->one;
    struct head *h = &c->loop->head;
    int used = h1_parse_response(c->in.p + c->in.off, buf_size(&c->in), h);
    if (used == 0)
        return STEP_MORE;
    if (used < 0 || (h->status < 200 && ++x->interim > MAX_INTERIM))
        return bad_response(c);
    if (h->status == 101) {
        if (!x->upgrade || !x->down)
            return bad_response(c);
        struct conn *down = x->down;
        down_head(x, h, BODY_NONE, 0);
        buf_take(c->loop, &c->in, (size_t)used);
        tunnel_begin(down, c);
        return STEP_STOP;
    }
    if (h->status < 200) {
        down_head(x, h, BODY_NONE, 0);
        buf_take(c->loop, &c->in, (size_t)used);
        return STEP_AGAIN;
    }
    enum body body;
    uint64_t length = 0;
    if (x->is_head || h->status == 204 || h->status == 304)
        body = BODY_NONE;
    else if (h->chunked)
        body = BODY_CHUNKED;
    else if (h->content_length >= 0)
        body = BODY_LENGTH;
    else
        body = BODY_CLOSE;
    if (h->content_length >= 0)
        length = (uint64_t)h->content_length;
    c->keep = !h->connection_close && (h->minor == 1 || h->connection_keep_alive) && body != BODY_CLOSE;
    c->spent |= may_be_unread(c);
    c->resp_left = length;
    c->resp_chunks = (struct h1_chunked){0};
    /* HEAD and 304 may give the length of what they leave out. */
    bool tell = body == BODY_NONE && h->content_length >= 0 && h->status != 204;
    down_head(x, h, tell ? BODY_LENGTH : body, length);
    buf_take(c->loop, &c->in, (size_t)used);
    if (!c->one)
        return STEP_STOP;
    c->r1 = body == BODY_CHUNKED ? R1_CHUNKED : body == BODY_CLOSE ? R1_CLOSE : R1_LENGTH;
    if (body == BODY_NONE || (body == BODY_LENGTH && !length))
        return response_done(c, NULL);
    return STEP_AGAIN;
}

static enum step read_body(struct conn *c)
{
    struct xchg *x = c->one;
    struct loop *l = c->loop;
    const char *p = c->in.p + c->in.off;
    size_t n = buf_size(&c->in), used = 0;
    struct str data = {NULL, 0};
    if (c->r1 == R1_TRAILERS) {
        struct head *t = &l->head;
        int k = h1_parse_trailers(p, n, t);
        if (k == 0)
            return STEP_MORE;
        if (k < 0)
            return bad_response(c);
        struct buf hold = c->in; /* trailers point into it */
        c->in = (struct buf){0};
        hold.off += (size_t)k;
        if (buf_size(&hold))
            c->keep = false; /* more than was asked for */
        enum step s = response_done(c, t);
        buf_free(l, &hold);
        return s;
    }
    if (down_wants_room(x)) {
        if (c->front && c->timer.class != T_ANSWER)
            conn_timer(c, T_ANSWER); /* for the client to take what it has been sent */
        return STEP_STOP;
    }
    switch (c->r1) {
    case R1_LENGTH:
        used = n < c->resp_left ? n : (size_t)c->resp_left;
        c->resp_left -= used;
        down_data(x, p, used);
        buf_take(l, &c->in, used);
        if (c->resp_left || !c->one)
            return STEP_AGAIN;
        if (buf_size(&c->in))
            c->keep = false;
        return response_done(c, NULL);
    case R1_CLOSE:
        down_data(x, p, n);
        buf_take(l, &c->in, n);
        return STEP_AGAIN;
    default:
        break;
    }
    enum h1_chunk_event e = h1_chunked_next(&c->resp_chunks, p, n, &used, &data);
    if (e == H1_CHUNK_BAD)
        return bad_response(c);
    if (e == H1_CHUNK_DATA)
        down_data(x, data.p, data.n);
    if (e == H1_CHUNK_TRAILERS)
        c->r1 = R1_TRAILERS;
    buf_take(l, &c->in, used);
    return STEP_AGAIN;
}

static void ended(struct conn *c, ssize_t how)
{
    struct xchg *x = c->one;
    if (x && x->resp_done) {
        up_ended_early(x);
        return;
    }
    if (x && how == -1 && c->r1 == R1_CLOSE && c->clean_eof) {
        c->keep = false;
        (void)response_done(c, NULL);
        return;
    }
    up_failed(c, R_UPSTREAM_CLOSED, tls_alert_received());
}

void up1_run(struct conn *c)
{
    for (unsigned turns = 0; turns < 256; turns++) {
        if (c->dead || c->phase != P_HTTP1)
            return;
        enum step s = STEP_MORE;
        if (buf_size(&c->in)) {
            if (!c->one || (c->one->resp_done)) { /* bytes that nobody asked for */
                if (c->one)
                    up_ended_early(c->one);
                else
                    conn_kill(c);
                return;
            }
            s = c->r1 == R1_HEAD ? read_head(c) : read_body(c);
        }
        if (s == STEP_AGAIN)
            continue;
        if (c->dead || c->phase != P_HTTP1)
            return;
        if (s == STEP_STOP) {
            if (c->one)
                return;
            if (!c->readable_end && c->drained)
                return; /* idle in the pool */
        }
        ssize_t n = conn_read(c);
        if (n == 0) {
            if (c->one && c->timer.class == T_ANSWER && c->one->resp_started)
                up_timer(c);
            return;
        }
        if (n < 0) {
            ended(c, n);
            return;
        }
        if (c->one)
            up_timer(c);
    }
    conn_again(c);
}
