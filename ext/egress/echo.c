/* Removes credentials from a host's responses: heads, bodies and trailers pass through here where a rule says `scrub`.
 *
 * What is searched for is what the request was given, so the snapshot of that moment is kept until the response is
 * complete. The length of a body is no longer known beforehand: Content-Length is left out, and HTTP/1 gets chunks or
 * the end of the connection. Encoded bodies and parts of bodies cannot be searched and are not asked for (see
 * apply_policy); they are refused where a host sends them nevertheless.
 */
#include <openssl/crypto.h>
#include <stdlib.h>

#include "down.h"
#include "loop.h"
#include "scrub.h"

/* Bytes of the texts that changed in a head: what writes heads has room for these and a head of the largest size. */
enum { MAX_CHANGED = 2 * H1_MAX_HEAD };

struct echo {
    struct snapshot *rules; /* the texts point into it */
    struct needles needles;
    struct buf unsure; /* what may be the beginning of one of them */
    bool counted;
};

void echo_begin(struct xchg *x, struct snapshot *s, const struct matched *m)
{
    echo_end(x); /* of an attempt before */
    if (!m->scrubs)
        return;
    struct echo *e = calloc(1, sizeof *e);
    if (!e)
        abort();
    snapshot_hold(s);
    e->rules = s;
    for (unsigned i = 0; i < m->scrubs; i++)
        for (unsigned k = 0; k < MAX_EXTRA; k++)
            needles_add(&e->needles, m->scrub[i]->extra[k], m->scrub[i]->placeholder);
    x->echo = e;
}

void echo_end(struct xchg *x)
{
    struct echo *e = x->echo;
    if (!e)
        return;
    x->echo = NULL;
    if (e->unsure.p)
        OPENSSL_cleanse(e->unsure.p, e->unsure.cap);
    buf_free(x->down->loop, &e->unsure);
    snapshot_release(e->rules);
    free(e);
}

static void count(struct xchg *x)
{
    if (!x->echo->counted)
        x->down->loop->counters[M_SCRUBBED]++;
    x->echo->counted = true;
}

/* A whole text; if there is something to replace in it, the result is added to `room`. */
static struct str scrub_text(struct xchg *x, struct buf *room, struct str text)
{
    struct loop *l = x->down->loop;
    struct str piece;
    size_t at = 0, start = room->len;
    if (!text.n)
        return text;
    while (at < text.n) {
        size_t used = scrub_next(&x->echo->needles, text.p + at, text.n - at, true, &piece);
        if (at == 0 && used == text.n && piece.p == text.p)
            return text;
        buf_add(l, room, piece.p, piece.n);
        at += used;
    }
    count(x);
    return (struct str){NULL, (uint32_t)(room->len - start)}; /* its address is known once the room no longer grows */
}

/* Fields about the body that are no longer true, or offer parts of it. */
static bool is_about_the_bytes(struct str name)
{
    return h1_is(name, "content-md5") || h1_is(name, "digest") || h1_is(name, "content-digest")
        || h1_is(name, "repr-digest") || h1_is(name, "accept-ranges");
}

/* The head with its values scrubbed; strings that changed are in `room`. False: it has become too large. */
static bool scrub_head(struct xchg *x, const struct head *from, struct head *to, struct buf *room)
{
    size_t at = 0;
    *to = *from;
    to->n = 0;
    to->reason = scrub_text(x, room, from->reason);
    for (unsigned i = 0; i < from->n; i++) {
        struct field f = from->f[i];
        if (is_about_the_bytes(f.name) || scrub_finds(&x->echo->needles, f.name))
            continue;
        f.value = scrub_text(x, room, f.value);
        to->f[to->n++] = f;
    }
    if (!to->reason.p && to->reason.n) {
        to->reason.p = room->p + room->off;
        at = to->reason.n;
    }
    for (unsigned i = 0; i < to->n; i++)
        if (!to->f[i].value.p && to->f[i].value.n) {
            to->f[i].value.p = room->p + room->off + at;
            at += to->f[i].value.n;
        }
    return buf_size(room) <= MAX_CHANGED;
}

static bool can_be_searched(const struct head *h)
{
    for (unsigned i = 0; i < h->n; i++)
        if (h1_is(h->f[i].name, "content-encoding") && !h1_is(h->f[i].value, "identity"))
            return false;
    return h->status != 206;
}

void echo_head(struct xchg *x, const struct head *h, enum body body, uint64_t length)
{
    struct head scrubbed;
    struct buf room = {0};
    struct loop *l = x->down->loop;
    bool empty = body == BODY_NONE || x->is_head || h->status == 304;
    if (h->status >= 200 && !empty && !can_be_searched(h)) {
        down_fail(x, R_UNSEARCHABLE, NULL);
        return;
    }
    if (!scrub_head(x, h, &scrubbed, &room)) {
        buf_free(l, &room);
        down_fail(x, R_UPSTREAM_RESPONSE, "with its credentials replaced, the head is too large");
        return;
    }
    if (empty)
        body = BODY_NONE; /* without the length of the body that is left out, which would be another one */
    else if (length)
        body = BODY_CHUNKED;
    down_pass_head(x, &scrubbed, body, 0);
    buf_free(l, &room);
}

static void give(struct xchg *x, const char *p, size_t n, size_t *given)
{
    *given += n;
    x->down->side->data(x, p, n);
}

/* Passes on what is decided, in one piece; bytes consumed, and in *given how many were sent. */
static size_t pass(struct xchg *x, const char *p, size_t n, bool last, size_t *given)
{
    struct loop *l = x->down->loop;
    struct buf made = {0};
    struct str piece;
    size_t at = 0, used;
    while ((used = scrub_next(&x->echo->needles, p + at, n - at, last, &piece))) {
        bool found = piece.p != p + at;
        at += used;
        if (!found && used == n) { /* mostly there is nothing, and no need for a copy */
            give(x, p, n, given);
            return n;
        }
        if (found)
            count(x);
        buf_add(l, &made, piece.p, piece.n);
    }
    if (made.p)
        give(x, made.p + made.off, buf_size(&made), given);
    buf_free(l, &made);
    return at;
}

/* The window of a host's stream follows what the guest takes, which is another number of bytes than came. */
static void balance(struct xchg *x, size_t came, size_t given)
{
    if (!x->up || !x->up->h2)
        return;
    if (given >= came)
        x->surplus += given - came;
    else
        (void)nghttp2_session_consume(x->up->h2, x->up_stream, came - given);
}

void echo_data(struct xchg *x, const char *p, size_t n)
{
    struct buf *unsure = &x->echo->unsure;
    struct loop *l = x->down->loop;
    size_t given = 0;
    if (buf_size(unsure)) {
        buf_add(l, unsure, p, n);
        buf_take(l, unsure, pass(x, unsure->p + unsure->off, buf_size(unsure), false, &given));
    } else {
        size_t used = pass(x, p, n, false, &given);
        if (used < n)
            buf_add(l, unsure, p + used, n - used);
    }
    balance(x, n, given);
}

void echo_finish(struct xchg *x, const struct head *trailers)
{
    struct buf *unsure = &x->echo->unsure, room = {0};
    struct loop *l = x->down->loop;
    struct head scrubbed;
    size_t given = 0;
    if (buf_size(unsure))
        (void)pass(x, unsure->p + unsure->off, buf_size(unsure), true, &given);
    balance(x, 0, given);
    if (trailers && !scrub_head(x, trailers, &scrubbed, &room))
        trailers = NULL;
    x->down->side->end(x, trailers ? &scrubbed : NULL);
    buf_free(l, &room);
}
