/* The guest's side in HTTP/2: every stream is decided as a request of its own, by the same rules as in HTTP/1.
 *
 * Flow control goes end to end: what a client sends is granted back to it only when the host has taken it.
 */
#define _GNU_SOURCE
#include <openssl/crypto.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "down.h"
#include "h2.h"
#include "loop.h"
#include "transform.h"

/* Streams opened and reset again: more of them in so short a time is an attack. */
enum { MAX_RESETS = 1000, RESETS_MS = 60 * 1000 };

static ssize_t provide_body(nghttp2_session *s, int32_t id, uint8_t *out, size_t n, uint32_t *flags,
                            nghttp2_data_source *source, void *user)
{
    struct conn *c = user;
    struct xchg *x = source->ptr;
    (void)s;
    if (!buf_size(&x->to_down)) {
        if (!x->to_down_end) {
            x->to_down_deferred = true;
            return NGHTTP2_ERR_DEFERRED;
        }
        *flags |= h2_end_body(c, id, x->down_trailers.head, NULL);
        return 0;
    }
    ssize_t given = h2_pull(c->loop, &x->to_down, out, n);
    if (x->up && x->up->h2) {
        size_t beyond = (size_t)given < x->surplus ? (size_t)given : x->surplus;
        x->surplus -= beyond;
        (void)nghttp2_session_consume(x->up->h2, x->up_stream, (size_t)given - beyond);
        conn_again(x->up);
    } else if (x->up && buf_size(&x->to_down) < conn_watermark(c)) {
        conn_again(x->up);
    }
    if (!buf_size(&x->to_down) && x->to_down_end && !(x->down_trailers.head && x->down_trailers.head->n))
        *flags |= NGHTTP2_DATA_FLAG_EOF;
    return given;
}

static void resume(struct xchg *x)
{
    if (x->to_down_deferred) {
        x->to_down_deferred = false;
        (void)nghttp2_session_resume_data(x->down->h2, x->down_stream);
    }
    conn_again(x->down);
}

static void down2_head(struct xchg *x, const struct head *h, enum body body, uint64_t length)
{
    struct conn *c = x->down;
    struct pairs p;
    pairs_start(c->loop, &p);
    pairs_number(&p, ":status", (uint64_t)h->status);
    for (unsigned i = 0; i < h->n; i++)
        if (response_field_passes(h, &h->f[i]))
            pairs_add(&p, h->f[i].name, h->f[i].value, false);
    if (!c->front)
        pairs_via(&p, h);
    if (body == BODY_LENGTH)
        pairs_number(&p, "content-length", length);
    if (h->status < 200) {
        (void)nghttp2_submit_headers(c->h2, NGHTTP2_FLAG_NONE, x->down_stream, NULL, p.nv, p.n, NULL);
    } else {
        bool empty = body == BODY_NONE || x->is_head || (body == BODY_LENGTH && !length) || h->status == 304;
        nghttp2_data_provider source = {.source.ptr = x, .read_callback = provide_body};
        (void)nghttp2_submit_response(c->h2, x->down_stream, p.nv, p.n, empty ? NULL : &source);
    }
    conn_again(c);
}

static void down2_data(struct xchg *x, const char *p, size_t n)
{
    buf_add(x->down->loop, &x->to_down, p, n);
    resume(x);
}

static void down2_end(struct xchg *x, const struct head *trailers)
{
    x->to_down_end = true;
    if (trailers && trailers->n)
        fields_copy(x->down->loop, &x->down_trailers, trailers);
    resume(x);
}

static void down2_finished(struct xchg *x)
{
    conn_again(x->down); /* nghttp2 closes the stream when all of it is sent */
}

static void down2_fail(struct xchg *x, enum reason why, const char *detail, bool told)
{
    struct conn *c = x->down;
    /* A request that the host refused unread is safe to repeat, and many clients do so by themselves. */
    if (told && x->reset_code != NGHTTP2_REFUSED_STREAM) {
        struct page page;
        failure_page(&page, x, why, detail);
        struct pairs p;
        pairs_start(c->loop, &p);
        pairs_number(&p, ":status", (uint64_t)page.status);
        pairs_add(&p, str_of("content-type"), str_of(page.type), false);
        pairs_number(&p, "content-length", page.n);
        for (unsigned i = 0; i < page.n_fields; i++)
            pairs_add(&p, str_of(page.fields[i].name), str_of(page.fields[i].value), false);
        if (!x->is_head)
            buf_add(c->loop, &x->to_down, page.body, page.n);
        x->to_down_end = true;
        nghttp2_data_provider source = {.source.ptr = x, .read_callback = provide_body};
        (void)nghttp2_submit_response(c->h2, x->down_stream, p.nv, p.n, x->is_head ? NULL : &source);
    } else {
        uint32_t code = x->reset_code ? x->reset_code : NGHTTP2_INTERNAL_ERROR;
        x->reset_by_us = true;
        (void)nghttp2_submit_rst_stream(c->h2, NGHTTP2_FLAG_NONE, x->down_stream, code);
    }
    x->req_done = x->resp_done = true;
    xchg_try_finish(x);
}

void down2_grant(struct xchg *x, size_t n)
{
    if (x->granted)
        return;
    (void)nghttp2_session_consume(x->down->h2, x->down_stream, n);
    conn_again(x->down);
}

void down2_consumed(struct xchg *x)
{
    if (x->unconsumed_down) {
        down2_grant(x, x->unconsumed_down);
        x->unconsumed_down = 0;
    }
}

/* Passes buffered request bytes on. */
static void push_up(struct xchg *x)
{
    if (!x->active || !x->up)
        return;
    x->up->side->resume(x);
    xchg_try_finish(x);
}

static void decide(struct xchg *x);

/* The body must be complete before the head is written: its bytes are granted back as they come, up to a bound. */
static void gather(struct xchg *x, const struct head *h)
{
    struct conn *c = x->down;
    if (h->content_length > TRANSFORM_BODY) {
        down_fail(x, R_TOO_LARGE, NULL);
        return;
    }
    if (!x->granted && buf_size(&x->to_up))
        down2_grant(x, buf_size(&x->to_up));
    x->granted = true;
    if (x->req_complete) {
        x->gathered = true;
        decide(x);
        return;
    }
    x->gathering = true;
    if (h->expect_continue) {
        struct pairs p;
        pairs_start(c->loop, &p);
        pairs_number(&p, ":status", 100);
        (void)nghttp2_submit_headers(c->h2, NGHTTP2_FLAG_NONE, x->down_stream, NULL, p.nv, p.n, NULL);
        conn_again(c);
    }
}

/* A guest's request by the rules of its instance. R_NONE, with the rules that apply in *m, borrowed from *s. */
static enum reason mediate(struct xchg *x, const struct head *h, struct matched *m, struct snapshot **s,
                           uint64_t *generation)
{
    x->to = x->down->to;
    enum reason why = target_of_h2(h, &x->to);
    return why == R_NONE ? xchg_decide(x, h, h->target, m, s, generation) : why;
}

/* Decides the stream and sends it on; called again when its upstream connection is ready. */
static void decide(struct xchg *x)
{
    struct conn *c = x->down;
    struct loop *l = c->loop;
    struct head *h = x->request.head;
    struct matched m = {0};
    struct snapshot *s = NULL;
    struct str path = h->target;
    uint64_t generation;
    enum reason why = c->front ? front_decide(x, h, &path, &generation) : mediate(x, h, &m, &s, &generation);
    if (why == R_APPROVAL_PENDING) {
        snapshot_release(s);
        if (!xchg_ask(x, path))
            down_fail(x, R_BUSY, NULL);
        return;
    }
    xchg_unask(x);
    if (why == R_NONE && m.unready) {
        snapshot_release(s);
        xchg_hold(x, R_CREDENTIAL);
        return;
    }
    if (why != R_NONE) {
        snapshot_release(s);
        down_fail(x, why, NULL);
        return;
    }
    if (m.transforms && !x->gathered && transform_needs_body(&m, h, h->target)) {
        snapshot_release(s);
        gather(x, h);
        return;
    }
    if (x->up && x->up->generation != generation && !c->front) {
        struct conn *old = x->up;
        x->up = NULL;
        old->side->abandon(old, x);
    }
    enum take taken = x->up ? TAKE_READY : up_take(x, generation, !c->front || is_grpc(h), x->retried);
    if (taken != TAKE_READY) {
        snapshot_release(s);
        if (taken == TAKE_FULL)
            down_fail(x, R_BUSY, NULL);
        return;
    }
    struct out room = {l->room, 0, TRANSFORM_ROOM, false};
    why = xchg_transform(x, h, h->target, &m, &room);
    if (why != R_NONE) {
        OPENSSL_cleanse(room.p, room.n);
        snapshot_release(s);
        down_fail(x, why, m.detail);
        return;
    }
    if (x->gathered)
        x->req_body = BODY_LENGTH;
    xchg_note_rules(x, s, &m);
    bool sent = true;
    x->retriable = x->reused && !x->retried && x->req_body == BODY_NONE && is_idempotent(h);
    if (x->up->h2) {
        sent = up2_send(x, h, h->target, x->req_body != BODY_NONE, &m);
    } else {
        struct request_line line = {h->target, x->req_body, x->gathered ? buf_size(&x->to_up) : x->req_left, false};
        up1_send(x, h, &line, &m);
    }
    OPENSSL_cleanse(room.p, room.n);
    snapshot_release(s);
    if (!sent) {
        x->up = NULL;
        down_fail(x, R_UPSTREAM_CLOSED, NULL);
        return;
    }
    if (x->req_body == BODY_NONE)
        x->req_done = x->req_complete = true;
    push_up(x);
}

static void on_request(struct xchg *x, bool ended)
{
    struct conn *c = x->down;
    struct head *h = fields_done(c->loop, &x->request);
    xchg_begin(x, c, h);
    c->loop->counters[M_REQUESTS] += !c->front;
    x->req_complete = ended;
    x->req_body = ended ? BODY_NONE : h->content_length >= 0 ? BODY_LENGTH : BODY_CHUNKED;
    x->req_left = h->content_length > 0 ? (uint64_t)h->content_length : 0;
    if (ended && (h1_is(h->method, "post") || h1_is(h->method, "put") || h1_is(h->method, "patch")))
        x->req_body = BODY_LENGTH; /* HTTP/1 hosts expect a length of 0 */
    if (x->bad)
        down_fail(x, R_BAD_REQUEST, NULL);
    else if (!c->front && !tenant_may_request(c->tenant, &c->loop->engine->table.limits, c->loop->now_us))
        down_fail(x, R_RATE, NULL);
    else
        decide(x);
}

static void request_ended(struct xchg *x)
{
    x->req_complete = true;
    if (x->active && x->gathering) {
        x->gathering = false;
        x->gathered = true;
        decide(x);
    } else if (x->active) {
        push_up(x);
    }
}

static int on_begin_headers(nghttp2_session *s, const nghttp2_frame *f, void *user)
{
    struct conn *c = user;
    if (f->hd.type != NGHTTP2_HEADERS)
        return 0;
    if (f->headers.cat != NGHTTP2_HCAT_REQUEST) {
        struct xchg *x = nghttp2_session_get_stream_user_data(s, f->hd.stream_id);
        if (x)
            fields_start(c->loop, &x->up_trailers);
        return 0;
    }
    struct xchg *x = calloc(1, sizeof *x);
    if (!x)
        abort();
    x->down = c;
    x->down_stream = f->hd.stream_id;
    if (!xchg_count(x)) { /* nothing was begun, so the client may try again */
        free(x);
        (void)nghttp2_submit_rst_stream(s, NGHTTP2_FLAG_NONE, f->hd.stream_id, NGHTTP2_REFUSED_STREAM);
        return 0;
    }
    fields_start(c->loop, &x->request);
    x->request.plain = !c->ssl;
    x->next = c->streams;
    if (c->streams)
        c->streams->prev = x;
    c->streams = x;
    c->stream_count++;
    (void)nghttp2_session_set_stream_user_data(s, f->hd.stream_id, x);
    return 0;
}

static int on_header(nghttp2_session *s, const nghttp2_frame *f, const uint8_t *name, size_t n, const uint8_t *value,
                     size_t m, uint8_t flags, void *user)
{
    struct conn *c = user;
    struct xchg *x = nghttp2_session_get_stream_user_data(s, f->hd.stream_id);
    (void)flags;
    if (!x || f->hd.type != NGHTTP2_HEADERS)
        return 0;
    bool first = f->headers.cat == NGHTTP2_HCAT_REQUEST;
    if (!fields_add(c->loop, first ? &x->request : &x->up_trailers, name, n, value, m))
        x->bad = true;
    return 0;
}

static bool resets_too_often(struct conn *c)
{
    if (c->loop->now_ms - c->resets_since > RESETS_MS) {
        c->resets_since = c->loop->now_ms;
        c->resets = 0;
    }
    return ++c->resets > MAX_RESETS;
}

static int on_frame(nghttp2_session *s, const nghttp2_frame *f, void *user)
{
    struct conn *c = user;
    struct xchg *x = f->hd.stream_id ? nghttp2_session_get_stream_user_data(s, f->hd.stream_id) : NULL;
    bool ended = f->hd.flags & NGHTTP2_FLAG_END_STREAM;
    if (!x)
        return 0;
    if (f->hd.type == NGHTTP2_HEADERS && f->headers.cat == NGHTTP2_HCAT_REQUEST) {
        on_request(x, ended);
    } else if (f->hd.type == NGHTTP2_HEADERS) {
        (void)fields_done(c->loop, &x->up_trailers);
        request_ended(x);
    } else if (f->hd.type == NGHTTP2_DATA && ended) {
        request_ended(x);
    } else if (f->hd.type == NGHTTP2_RST_STREAM && resets_too_often(c)) {
        (void)nghttp2_session_terminate_session(s, NGHTTP2_ENHANCE_YOUR_CALM);
    }
    return 0;
}

static int on_data(nghttp2_session *s, uint8_t flags, int32_t id, const uint8_t *p, size_t n, void *user)
{
    struct conn *c = user;
    struct xchg *x = nghttp2_session_get_stream_user_data(s, id);
    (void)flags;
    if (!x || !x->active || (!x->up && !x->waiting && !x->gathering)) {
        (void)nghttp2_session_consume(s, id, n); /* no longer wanted */
        return 0;
    }
    if (x->gathering) {
        (void)nghttp2_session_consume(s, id, n);
        (void)xchg_gather(x, (const char *)p, n);
        return 0;
    }
    x->up_bytes += n;
    buf_add(c->loop, &x->to_up, (const char *)p, n);
    push_up(x);
    return 0;
}

static int on_sent(nghttp2_session *s, const nghttp2_frame *f, void *user)
{
    struct conn *c = user;
    if (f->hd.type == NGHTTP2_RST_STREAM) {
        struct xchg *x = nghttp2_session_get_stream_user_data(s, f->hd.stream_id);
        bool made_to = f->rst_stream.error_code != NGHTTP2_NO_ERROR && !(x && x->reset_by_us);
        if (made_to && resets_too_often(c)) /* a client's violation is as cheap for it as a reset */
            (void)nghttp2_session_terminate_session(s, NGHTTP2_ENHANCE_YOUR_CALM);
        return 0;
    }
    if ((f->hd.type == NGHTTP2_DATA || f->hd.type == NGHTTP2_HEADERS) && f->hd.flags & NGHTTP2_FLAG_END_STREAM) {
        struct xchg *x = nghttp2_session_get_stream_user_data(s, f->hd.stream_id);
        if (x && !x->req_complete) /* the answer is complete, the rest of the request is not needed */
            (void)nghttp2_submit_rst_stream(s, NGHTTP2_FLAG_NONE, f->hd.stream_id, NGHTTP2_NO_ERROR);
    }
    return 0;
}

static void drop(struct conn *c, struct xchg *x)
{
    if (x->active) {
        up_abandon(x);
        x->active = false;
        x->reason = R_CLIENT_CLOSED;
        audit_record(c->loop, c->tenant, x);
    }
    if (c->h2 && buf_size(&x->to_up) && !x->granted)
        (void)nghttp2_session_consume_connection(c->h2, buf_size(&x->to_up));
    *(x->prev ? &x->prev->next : &c->streams) = x->next;
    if (x->next)
        x->next->prev = x->prev;
    c->stream_count--;
    xchg_uncount(x);
    echo_end(x);
    visit_end(x);
    fields_free(c->loop, &x->request);
    fields_free(c->loop, &x->up_trailers);
    fields_free(c->loop, &x->down_trailers);
    fields_free(c->loop, &x->response);
    buf_free(c->loop, &x->to_up);
    buf_free(c->loop, &x->to_down);
    free(x);
}

static int on_close(nghttp2_session *s, int32_t id, uint32_t code, void *user)
{
    struct conn *c = user;
    struct xchg *x = nghttp2_session_get_stream_user_data(s, id);
    (void)code;
    if (x) {
        (void)nghttp2_session_set_stream_user_data(s, id, NULL);
        drop(c, x);
    }
    if (!c->streams)
        conn_timer(c, T_IDLE_DOWN);
    return 0;
}

static nghttp2_session_callbacks *callbacks;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void make_callbacks(void)
{
    if (nghttp2_session_callbacks_new(&callbacks) != 0)
        return;
    nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, on_begin_headers);
    nghttp2_session_callbacks_set_on_header_callback(callbacks, on_header);
    nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, on_frame);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, on_data);
    nghttp2_session_callbacks_set_on_frame_send_callback(callbacks, on_sent);
    nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_close);
}

static bool full(struct xchg *x)
{
    return buf_size(&x->to_down) >= conn_watermark(x->down);
}

static void again(struct xchg *x)
{
    (void)x; /* its head is kept until the stream ends */
}

static void lost(struct conn *c)
{
    while (c->streams)
        drop(c, c->streams);
}

static void pump(struct conn *c);

const struct side DOWN2 = {
    .head = down2_head,
    .fail = down2_fail,
    .finished = down2_finished,
    .again = again,
    .full = full,
    .data = down2_data,
    .end = down2_end,
    .resume = decide,
    .pump = pump,
    .lost = lost,
};

bool down2_begin(struct conn *c)
{
    c->side = &DOWN2;
    (void)pthread_once(&once, make_callbacks);
    c->h2 = h2_session(c, true, callbacks);
    return c->h2 != NULL;
}

static void pump(struct conn *c)
{
    if (c->dead || c->in_h2)
        return;
    if (c->loop->draining && !c->goaway) {
        c->goaway = true;
        (void)nghttp2_submit_goaway(c->h2, NGHTTP2_FLAG_NONE, nghttp2_session_get_last_proc_stream_id(c->h2),
                                    NGHTTP2_NO_ERROR, NULL, 0);
    }
    h2_pump(c);
    if (c->dead || c->broken)
        return;
    bool over = !nghttp2_session_want_read(c->h2) && !nghttp2_session_want_write(c->h2);
    if (over || (c->goaway && !c->streams)) {
        lost(c);
        conn_finish(c, true);
    }
}

void down2_run(struct conn *c)
{
    bool had = c->streams != NULL;
    int r = h2_read(c);
    if (c->dead)
        return;
    if (r < 0) {
        if (!c->sock_eof && !c->clean_eof)
            h2_pump(c); /* the GOAWAY that says why */
        lost(c);
        conn_finish(c, false);
        return;
    }
    if (c->streams)
        conn_timer(c, T_STREAM);
    else if (had || c->head_timer)
        conn_timer(c, T_IDLE_DOWN);
    c->head_timer = false;
    pump(c);
}
