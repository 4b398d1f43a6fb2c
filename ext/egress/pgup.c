/* Logins to Postgres, the host's side: TLS, the startup message, the password. See pgdown.c. */
#define _GNU_SOURCE
#include <openssl/crypto.h>
#include <openssl/x509.h>
#include <string.h>

#include "encoded.h"
#include "postgres.h"

enum {
    AT_ONCE = 8192,         /* iterations before others get a turn */
    HEARD_MAX = 128 * 1024, /* bytes of the host until the guest may speak */
};

bool postgres_asks_for_tls(const struct conn *up)
{
    return up->to.postgres && up->to.tls && !(up->pass_for && up->pass_for->pg->direct);
}

void postgres_ask_for_tls(struct conn *up)
{
    struct out o = login_scratch(up);
    up->phase = P_POSTGRES_TLS;
    pg_write_request(&o, PG_SSL_REQUEST);
    conn_write(up, o.p, o.n);
}

void postgres_tls_answer(struct conn *up)
{
    ssize_t n = conn_read(up);
    if (n == 0)
        return;
    /* One byte and nothing behind it: what comes before TLS could be anybody's. */
    if (n == 1 && up->in.p[up->in.off] == 'S') {
        buf_take(up->loop, &up->in, 1);
        if (up->pass_for)
            up_ready(up); /* the hello is the guest's */
        else
            up_begin_tls(up);
        return;
    }
    bool declined = n == 1 && up->in.p[up->in.off] == 'N';
    up_failed(up, n < 0 ? R_UPSTREAM_CLOSED : R_UPSTREAM_TLS,
              declined    ? "the server does not offer TLS"
                  : n < 0 ? NULL
                          : "the server does not answer with TLS");
}

void pg_begin_host(struct conn *up)
{
    struct conn *c = up->one->down;
    struct postgres *pg = c->pg;
    struct out o = login_scratch(up);
    conn_timer(up, T_HANDSHAKE);
    if (pg->cancels) {
        pg_write_cancel(&o, pg->process, pg->secret);
        conn_write(up, o.p, o.n);
        pg->host = H_CANCELLED;
    } else {
        conn_write(up, pg->startup.p, pg->startup.n);
        pg->host = H_ASKED;
    }
    conn_again(up);
}

static void begin_scram(struct conn *up, bool plus)
{
    struct postgres *pg = up->one->down->pg;
    struct scram_binding binding = {.n = 0};
    pg->client_size = sizeof *pg->client;
    pg->client = locked_new(&pg->client_size);
    if (!pg->client)
        abort();
    if (plus) {
        X509 *theirs = SSL_get1_peer_certificate(up->ssl);
        binding = scram_binding_of(theirs);
        X509_free(theirs);
    }
    /* "y" claims that the server has no binding, which one that offered it would take for an attack */
    enum scram_bound bound = plus && binding.n ? SCRAM_BOUND : up->ssl && !plus ? SCRAM_NOT_OFFERED : SCRAM_UNBOUND;
    scram_client_begin(pg->client, bound, &binding, NULL);
    struct out o = login_scratch(up);
    pg_write_sasl_initial(&o, bound == SCRAM_BOUND ? SCRAM_PLUS : SCRAM,
                          (struct str){pg->client->first.p, pg->client->first.n});
    conn_write(up, o.p, o.n);
    pg->host = H_SCRAM;
}

static enum step derive(struct conn *up)
{
    struct postgres *pg = up->one->down->pg;
    if (!scram_client_derive(pg->client, AT_ONCE)) {
        if (!up->shaking && !(up->shaking = conn_take(up, B_HANDSHAKES, 1)))
            return login_give_up(up, R_BUSY, NULL); /* the more there are, the longer everybody else waits for a turn */
        conn_timer(up, T_TURN);
        return STEP_STOP;
    }
    if (up->shaking)
        conn_give(up, B_HANDSHAKES, 1);
    up->shaking = false;
    conn_timer(up, T_HANDSHAKE);
    scram_client_prove(pg->client);
    struct out o = login_scratch(up);
    pg_write(&o, 'p', (struct str){pg->client->final.p, pg->client->final.n});
    conn_write(up, o.p, o.n);
    login_note_use(up);
    pg->host = H_FINAL;
    return STEP_AGAIN;
}

static enum step take_challenge(struct conn *up, struct str data)
{
    struct snapshot *s;
    struct postgres *pg = up->one->down->pg;
    const struct rule *r = login_password_rule(up, &up->one->down->pg->login, &s);
    if (!r)
        return STEP_STOP;
    bool good = scram_client_take(pg->client, data, r->value);
    snapshot_release(s);
    if (!good)
        return login_give_up(up, R_LOGIN_UPSTREAM, "its challenge is malformed, or has too few or too many iterations");
    pg->host = H_DERIVE;
    return STEP_AGAIN;
}

/* An older way to authenticate, if the rule accepts it. */
static enum step answer_simply(struct conn *up, uint32_t kind, struct str salt)
{
    struct snapshot *s;
    struct postgres *pg = up->one->down->pg;
    const struct rule *r = login_password_rule(up, &up->one->down->pg->login, &s);
    char md5[36];
    if (!r)
        return STEP_STOP;
    bool any = str_is(r->extra[LOGIN_METHOD], "password");
    bool clear = kind == PG_AUTH_CLEARTEXT && any && up->ssl && !salt.n;
    bool hashed = kind == PG_AUTH_MD5 && (any || str_is(r->extra[LOGIN_METHOD], "md5")) && salt.n == 4;
    if (!clear && !hashed) {
        snapshot_release(s);
        return login_give_up(up, R_LOGIN_UPSTREAM, "it does not ask for SCRAM-SHA-256, or what else the rule accepts");
    }
    struct out o = login_scratch(up);
    struct str answer = r->value;
    if (hashed) {
        md5_answer(r->value, pg->login.user, salt, md5);
        answer = str_of(md5);
    }
    char type = 'p';
    out_add(&o, &type, 1);
    const uint32_t n = answer.n + 5;
    out_add(&o, (const char[]){0, 0, (char)(n >> 8), (char)n}, 4);
    out_add(&o, answer.p, answer.n);
    out_add(&o, "", 1);
    (void)conn_secret(up, o.p, o.n);
    OPENSSL_cleanse(o.p, o.n);
    snapshot_release(s);
    login_note_use(up);
    pg->host = H_KNOWN;
    return STEP_AGAIN;
}

/* The rules may have changed while it was on its way. Their generation says nothing: it is also noted when TLS begins. */
static enum reason decide_again(struct conn *up)
{
    struct conn *c = up->one->down;
    enum reason why = pg_decide(c, &up->generation);
    return why == R_NONE && c->x.to.tls && !up->ssl ? R_UPSTREAM_TLS : why;
}

static enum step welcome(struct conn *up)
{
    struct xchg *x = up->one;
    enum reason why = decide_again(up);
    if (why != R_NONE)
        return login_give_up(up, why, NULL);
    struct out o = login_scratch(x->down);
    pg_write_authentication(&o, PG_AUTH_OK, (struct str){"", 0});
    conn_write(x->down, o.p, o.n);
    pg_forget_client(x->down->pg);
    x->status = 200;
    x->resp_started = true;
    x->down->pg->host = H_READY;
    return STEP_AGAIN;
}

static enum step authenticate(struct conn *up, struct str body)
{
    struct postgres *pg = up->one->down->pg;
    struct str rest;
    uint32_t kind;
    if (!pg_read_authentication(body, &kind, &rest))
        return login_give_up(up, R_UPSTREAM_RESPONSE, NULL);
    if (kind == PG_AUTH_OK && pg->host == H_KNOWN && !rest.n)
        return welcome(up);
    if (kind == PG_AUTH_SASL && pg->host == H_ASKED) {
        bool plus = up->ssl && pg_offers(rest, SCRAM_PLUS);
        if (!plus && !pg_offers(rest, SCRAM))
            return login_give_up(up, R_LOGIN_UPSTREAM, "it does not offer SCRAM-SHA-256");
        begin_scram(up, plus);
        return STEP_AGAIN;
    }
    if (kind == PG_AUTH_SASL_CONTINUE && pg->host == H_SCRAM)
        return take_challenge(up, rest);
    if (kind == PG_AUTH_SASL_FINAL && pg->host == H_FINAL) {
        if (!scram_client_trusts(pg->client, rest))
            return login_give_up(up, R_LOGIN_UPSTREAM, "it could not show that it knows the password");
        pg->host = H_KNOWN;
        return STEP_AGAIN;
    }
    if (kind == PG_AUTH_OK)
        return login_give_up(up, R_LOGIN_UPSTREAM, "it lets in without having asked for the password");
    if (pg->host == H_ASKED)
        return answer_simply(up, kind, rest);
    return login_give_up(up, R_LOGIN_UPSTREAM, "it authenticates in an order that is none");
}

/* An ErrorResponse of the host, over TLS verified for its name, is the guest's as it is. */
static enum step pass_refusal(struct conn *up, const struct pg_message *m)
{
    struct xchg *x = up->one;
    struct conn *c = x->down;
    struct str state = pg_error_field(m->body, 'C');
    if (!x->resp_started)
        x->status = state.n == 5 && memcmp(state.p, "28", 2) == 0 ? 401 : 503;
    conn_write(c, up->in.p + up->in.off, m->size);
    up->one = NULL;
    x->up = NULL;
    conn_kill(up);
    x->req_done = x->resp_done = true;
    xchg_try_finish(x);
    return STEP_STOP;
}

/* Messages of a session that begins, up to the first that lets the guest speak. */
static enum step pass_message(struct conn *up, const struct pg_message *m)
{
    struct xchg *x = up->one;
    struct conn *c = x->down;
    struct session *s = &c->pg->session;
    bool key = m->type == 'K' && !s->listed && pg_read_key(m->body, &s->process, &s->secret);
    if (!key && m->type != 'S' && m->type != 'N' && m->type != 'Z')
        return login_give_up(up, R_UPSTREAM_RESPONSE, NULL);
    if (key) {
        s->to = x->to;
        pg_list_session(c);
    }
    bool ready = m->type == 'Z';
    enum reason why = ready ? decide_again(up) : R_NONE; /* from now on only a change of the rules has it looked at */
    if (why != R_NONE)
        return login_give_up(up, why, NULL);
    conn_write(c, up->in.p + up->in.off, m->size);
    x->down_bytes += m->size;
    buf_take(up->loop, &up->in, m->size);
    if (!ready)
        return STEP_AGAIN;
    tunnel_begin(c, up);
    return STEP_STOP;
}

static enum step take_message(struct conn *up, const struct pg_message *m)
{
    enum step step = STEP_AGAIN;
    if (m->type == 'E')
        return pass_refusal(up, m);
    if (up->one->down->pg->host == H_READY)
        return pass_message(up, m);
    if (m->type == 'R')
        step = authenticate(up, m->body);
    else if (m->type != 'N') /* a notice: clients expect none so early */
        return login_give_up(up, R_UPSTREAM_RESPONSE, NULL);
    if (!up->dead)
        buf_take(up->loop, &up->in, m->size);
    return step;
}

/* The server closes the connection once it has noted the cancellation, and clients wait for that. */
static void cancelled(struct conn *up)
{
    struct xchg *x = up->one;
    up->one = NULL;
    x->up = NULL;
    x->status = 200;
    conn_kill(up);
    x->req_done = x->resp_done = true;
    xchg_try_finish(x);
}

static enum step host_step(struct conn *up)
{
    struct pg_message m;
    const struct postgres *pg = up->one->down->pg;
    if (pg->host == H_DERIVE)
        return derive(up);
    size_t n = buf_size(&up->in);
    if (pg->host == H_CANCELLED) {
        buf_take(up->loop, &up->in, n);
        return STEP_MORE;
    }
    switch (n ? pg_read_message(up->in.p + up->in.off, n, PG_MESSAGE_MAX, &m) : PG_MORE) {
    case PG_BAD:
        return login_give_up(up, R_UPSTREAM_RESPONSE, NULL);
    case PG_OK:
        return take_message(up, &m);
    default:
        return STEP_MORE;
    }
}

void postgres_host_run(struct conn *up)
{
    for (;;) {
        if (up->dead || !up->one || up->phase != P_POSTGRES || up->one->down->pg->host == H_NEW)
            return;
        enum step s = host_step(up);
        if (s == STEP_AGAIN)
            continue;
        if (s == STEP_STOP)
            return;
        ssize_t n = conn_read(up);
        if (n == 0)
            return;
        struct postgres *pg = up->one->down->pg;
        pg->heard += n > 0 ? (size_t)n : 0;
        if (pg->heard > HEARD_MAX) {
            up_failed(up, R_UPSTREAM_RESPONSE, "it says too much before the session is ready");
            return;
        }
        if (n > 0)
            continue;
        if (pg->host == H_CANCELLED)
            cancelled(up);
        else
            up_failed(up, R_UPSTREAM_CLOSED, NULL);
        return;
    }
}
