/* The host's side in HTTP/2: many requests of one instance on one connection. Used for guests that speak HTTP/2, and
 * for gRPC of clients of ingresses, which goes to the guest without TLS. */
#define _GNU_SOURCE
#include <openssl/crypto.h>
#include <string.h>

#include "down.h"
#include "h2.h"
#include "loop.h"

static ssize_t provide_body(nghttp2_session *s, int32_t id, uint8_t *out, size_t n, uint32_t *flags,
                            nghttp2_data_source *source, void *user)
{
    struct conn *c = user;
    struct xchg *x = source->ptr;
    if (nghttp2_session_get_stream_user_data(s, id) != x)
        return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE; /* abandoned */
    ssize_t given = 0;
    if (buf_size(&x->to_up)) {
        given = h2_pull(c->loop, &x->to_up, out, n);
        x->unconsumed_down += (size_t)given;
        x->taken = true;
        down2_consumed(x);
    }
    if (buf_size(&x->to_up))
        return given;
    if (!x->req_complete) {
        if (given)
            return given;
        x->to_up_deferred = true;
        return NGHTTP2_ERR_DEFERRED;
    }
    *flags |= h2_end_body(c, id, x->matched_trailers ? NULL : x->up_trailers.head, x->visit ? x->visit->route : NULL);
    return given;
}

static void add_mediated(struct pairs *p, const struct xchg *x, const struct head *h, struct str path,
                         const struct matched *m)
{
    pairs_add(p, str_of(":scheme"), str_of("https"), false);
    pairs_authority(p, &x->to);
    pairs_add(p, str_of(":path"), m->path.n ? m->path : path, m->path.n > 0);
    for (unsigned i = 0; i < h->n; i++)
        if (request_field_passes(h, &h->f[i], m))
            pairs_add(p, h->f[i].name, h->f[i].value, false);
    pairs_max_forwards(p, h);
    pairs_via(p, h);
}

/* By an ingress. */
static void add_forwarded(struct pairs *p, const struct xchg *x, const struct head *h, struct str path)
{
    struct forwarded from = front_forwarded(x, h);
    pairs_add(p, str_of(":scheme"), str_of("http"), false);
    pairs_add(p, str_of(":authority"), from.authority, false);
    pairs_add(p, str_of(":path"), path, false);
    for (unsigned i = 0; i < h->n; i++)
        if (forward_field_passes(h, &h->f[i], &from))
            pairs_add(p, h->f[i].name, h->f[i].value, false);
    pairs_forwarded(p, &from);
    pairs_max_forwards(p, h);
}

bool up2_send(struct xchg *x, const struct head *h, struct str path, bool body, const struct matched *m)
{
    struct conn *c = x->up;
    struct pairs p;
    pairs_start(c->loop, &p);
    pairs_add(&p, str_of(":method"), h->method, false);
    if (c->front)
        add_forwarded(&p, x, h, path);
    else
        add_mediated(&p, x, h, path, m);
    if (h->te_trailers)
        pairs_add(&p, (struct str){"te", 2}, (struct str){"trailers", 8}, false);
    if (x->gathered)
        pairs_number(&p, "content-length", buf_size(&x->to_up));
    else if (h->content_length >= 0)
        pairs_number(&p, "content-length", (uint64_t)h->content_length);
    for (unsigned i = 0; i < m->fields; i++)
        if (m->set[i].value.p)
            pairs_add(&p, m->set[i].name, m->set[i].value, true);
    body = body && (!x->req_complete || buf_size(&x->to_up) || x->up_trailers.head);
    nghttp2_data_provider source = {.source.ptr = x, .read_callback = provide_body};
    int32_t id = nghttp2_submit_request(c->h2, NULL, p.nv, p.n, body ? &source : NULL, x);
    if (id < 0)
        return false;
    if (!body)
        x->req_done = true;
    x->matched_trailers = m->n > 0;
    x->up_stream = id;
    x->up_prev = NULL;
    x->up_next = c->streams;
    if (c->streams)
        c->streams->up_prev = x;
    c->streams = x;
    c->stream_count++;
    c->served = true;
    conn_timer(c, T_STREAM);
    conn_again(c);
    return true;
}

void up2_detach(struct conn *c, struct xchg *x)
{
    bool linked = c->streams == x || x->up_prev;
    x->up = NULL;
    if (!linked)
        return;
    *(x->up_prev ? &x->up_prev->up_next : &c->streams) = x->up_next;
    if (x->up_next)
        x->up_next->up_prev = x->up_prev;
    x->up_prev = x->up_next = NULL;
    c->stream_count--;
    (void)nghttp2_session_set_stream_user_data(c->h2, x->up_stream, NULL);
    if (buf_size(&x->to_down)
        > x->surplus) /* received, and now without a stream: the connection's window must not shrink by it */
        (void)nghttp2_session_consume_connection(c->h2, buf_size(&x->to_down) - x->surplus);
    if (!c->streams)
        conn_timer(c, T_IDLE_UP);
    conn_again(c);
}

static void up2_abandon(struct conn *c, struct xchg *x)
{
    int32_t id = x->up_stream;
    bool sent = c->streams == x || x->up_prev;
    up2_detach(c, x);
    if (!c->dead && sent && id > 0)
        (void)nghttp2_submit_rst_stream(c->h2, NGHTTP2_FLAG_NONE, id, NGHTTP2_CANCEL);
}

static int on_begin_headers(nghttp2_session *s, const nghttp2_frame *f, void *user)
{
    struct conn *c = user;
    struct xchg *x = nghttp2_session_get_stream_user_data(s, f->hd.stream_id);
    if (x && f->hd.type == NGHTTP2_HEADERS)
        fields_start(c->loop, &x->response);
    return 0;
}

static int on_header(nghttp2_session *s, const nghttp2_frame *f, const uint8_t *name, size_t n, const uint8_t *value,
                     size_t m, uint8_t flags, void *user)
{
    struct conn *c = user;
    struct xchg *x = nghttp2_session_get_stream_user_data(s, f->hd.stream_id);
    (void)flags;
    if (x && f->hd.type == NGHTTP2_HEADERS && !fields_add(c->loop, &x->response, name, n, value, m))
        return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
    return 0;
}

static void response_ended(struct xchg *x, const struct head *trailers)
{
    down_end(x, trailers);
    xchg_try_finish(x);
}

static void on_headers(struct xchg *x, bool ended)
{
    struct head *h = fields_done(x->up->loop, &x->response);
    if (!h)
        return;
    if (x->resp_started) {
        response_ended(x, h);
        return;
    }
    if (h->status < 200 && ++x->interim > MAX_INTERIM) {
        down_fail(x, R_UPSTREAM_RESPONSE, NULL);
        return;
    }
    enum body body = ended ? BODY_NONE : h->content_length >= 0 ? BODY_LENGTH : BODY_CHUNKED;
    if (ended && h->content_length >= 0 && h->status != 204)
        body = BODY_LENGTH;
    if (ended) {
        x->to_down_end = true;
        if (body == BODY_LENGTH && h->content_length > 0)
            x->is_head = true; /* a length without a body: HEAD or 304 */
    }
    down_head(x, h, body, h->content_length > 0 ? (uint64_t)h->content_length : 0);
    if (ended && x->up) /* else it was refused */
        response_ended(x, NULL);
}

static int on_frame(nghttp2_session *s, const nghttp2_frame *f, void *user)
{
    struct conn *c = user;
    if (f->hd.type == NGHTTP2_GOAWAY && c->pooled) {
        pool_remove(c); /* open streams may end; no new ones */
        c->goaway = true;
    }
    struct xchg *x = f->hd.stream_id ? nghttp2_session_get_stream_user_data(s, f->hd.stream_id) : NULL;
    bool ended = f->hd.flags & NGHTTP2_FLAG_END_STREAM;
    if (x && f->hd.type == NGHTTP2_HEADERS)
        on_headers(x, ended);
    else if (x && f->hd.type == NGHTTP2_DATA && ended)
        response_ended(x, NULL);
    return 0;
}

static int on_data(nghttp2_session *s, uint8_t flags, int32_t id, const uint8_t *p, size_t n, void *user)
{
    struct xchg *x = nghttp2_session_get_stream_user_data(s, id);
    (void)flags;
    (void)user;
    if (!x) {
        (void)nghttp2_session_consume(s, id, n);
        return 0;
    }
    down_data(x, (const char *)p, n);
    return 0;
}

static int on_close(nghttp2_session *s, int32_t id, uint32_t code, void *user)
{
    struct conn *c = user;
    struct xchg *x = nghttp2_session_get_stream_user_data(s, id);
    if (!x)
        return 0;
    (void)nghttp2_session_set_stream_user_data(s, id, NULL);
    up2_detach(c, x);
    if (x->resp_done) {
        up_ended_early(x);
        return 0;
    }
    x->reset_code = code;
    up_failed_one(c, x, R_UPSTREAM_CLOSED, code ? nghttp2_http2_strerror(code) : NULL);
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
    nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_close);
}

static void pump(struct conn *c);

/* nghttp2 asks for the body by itself, once it knows that there is some. */
static void resume(struct xchg *x)
{
    if (x->to_up_deferred) {
        x->to_up_deferred = false;
        (void)nghttp2_session_resume_data(x->up->h2, x->up_stream);
    }
    conn_again(x->up);
    if (x->req_complete)
        x->req_done = true;
}

static void lost(struct conn *c)
{
    up_failed(c, R_UPSTREAM_CLOSED, NULL);
}

/* No data and end: only guests of HTTP/2 use this, and their bodies are pulled out of the streams' buffers. */
const struct side UP2 = {
    .abandon = up2_abandon,
    .release = up2_detach,
    .resume = resume,
    .pump = pump,
    .lost = lost,
};

bool up2_begin(struct conn *c)
{
    c->side = &UP2;
    (void)pthread_once(&once, make_callbacks);
    c->h2 = h2_session(c, false, callbacks);
    conn_again(c);
    return c->h2 != NULL;
}

static void pump(struct conn *c)
{
    h2_pump(c);
    if (c->dead || c->broken)
        return;
    bool over = !nghttp2_session_want_read(c->h2) && !nghttp2_session_want_write(c->h2);
    if (over && c->streams) /* it was nghttp2 that ended the connection, because of what the host sent */
        up_failed(c, R_UPSTREAM_RESPONSE, NULL);
    else if (over || (!c->streams && !c->waiting && (c->goaway || !c->pooled)))
        up_failed(c, R_UPSTREAM_CLOSED, NULL);
}

void up2_run(struct conn *c)
{
    int r = h2_read(c);
    if (c->dead)
        return;
    if (r < 0) {
        up_failed(c, R_UPSTREAM_CLOSED, tls_alert_received());
        return;
    }
    if (c->streams)
        conn_timer(c, T_STREAM);
    pump(c);
}
