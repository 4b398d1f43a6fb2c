/* Logins to Postgres: the guest proves that it has the placeholder, the host is shown the password.
 *
 *   guest                                    engine                                        host
 *   SSLRequest, TLS (or TLS at once)    →    leaf for the server name
 *   StartupMessage                      →    role, database, where it may go
 *   SCRAM with the placeholder         ←→
 *                                            SSLRequest, TLS verified for the same name →
 *                                            StartupMessage, SCRAM with the password   ←→
 *   AuthenticationOk, ReadyForQuery     ←    tunnel (splice.c)
 *
 * The guest's own SCRAM keeps nothing secret. It is there because clients may insist on it and on channel binding
 * (require_auth, channel_binding of libpq), and so that a password of the guest's own is never disclosed to us.
 *
 * The host can downgrade nothing: it must speak TLS, offer SCRAM-SHA-256 and show that it knows the password too, unless
 * the rule says otherwise. What it says before TLS reaches nobody. Channel binding is used where it is offered.
 *
 * Keys to cancel queries are noted with where they lead, because a CancelRequest names no host. One that
 * no session of the instance has is dropped.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "encoded.h"
#include "postgres.h"

enum { GUEST_MESSAGE = 2048 };

static struct postgres *pg_of(struct conn *c)
{
    if (!c->pg && !(c->pg = calloc(1, sizeof *c->pg)))
        abort(); /* nothing sensible is left to do without memory */
    c->pg->login.kind = RULE_POSTGRES;
    c->pg->login.method = "POSTGRES";
    return c->pg;
}

void pg_forget_client(struct postgres *pg)
{
    if (pg->client)
        locked_free(pg->client, pg->client_size);
    pg->client = NULL;
}

static void unlist(struct tenant *t, struct session *s)
{
    if (!s->listed)
        return;
    (void)pthread_mutex_lock(&t->lock);
    *(s->prev ? &s->prev->next : &t->sessions) = s->next;
    if (s->next)
        s->next->prev = s->prev;
    (void)pthread_mutex_unlock(&t->lock);
    s->listed = false;
}

void pg_list_session(struct conn *c)
{
    struct tenant *t = c->tenant;
    struct session *s = &c->pg->session;
    (void)pthread_mutex_lock(&t->lock);
    s->prev = NULL;
    s->next = t->sessions;
    if (s->next)
        s->next->prev = s;
    t->sessions = s;
    s->listed = true;
    (void)pthread_mutex_unlock(&t->lock);
}

static bool find_session(struct tenant *t, uint32_t process, uint32_t secret, struct destination *to)
{
    (void)pthread_mutex_lock(&t->lock);
    const struct session *s = t->sessions;
    while (s && !(s->process == process && s->secret == secret))
        s = s->next;
    if (s)
        *to = s->to;
    (void)pthread_mutex_unlock(&t->lock);
    return s != NULL;
}

void postgres_end(struct conn *c)
{
    if (!c->pg)
        return;
    unlist(c->tenant, &c->pg->session);
    pg_forget_client(c->pg);
    free((char *)c->pg->startup.p);
    free(c->pg);
    c->pg = NULL;
}

/* ── What the guest is told ──────────────────────────────────────────────────────────────────── */

static const char *sqlstate_of(enum reason why)
{
    switch (why) {
    case R_PG_PROTOCOL:
        return "08P01"; /* protocol_violation */
    case R_LOGIN_PASSWORD:
        return "28P01"; /* invalid_password */
    case R_RATE:
    case R_BUSY:
        return "53300"; /* too_many_connections */
    case R_CREDENTIAL:
    case R_DRAINING:
        return "57P03"; /* cannot_connect_now */
    default:
        /* sqlclient_unable_to_establish_sqlconnection, invalid_authorization_specification */
        return REASONS[why].status >= 500 ? "08001" : "28000";
    }
}

static void fail(struct xchg *x, enum reason why, const char *detail, bool told)
{
    struct conn *c = x->down;
    const struct reason_text *r = &REASONS[why];
    char message[300];
    (void)snprintf(message, sizeof message, "hypeman: %s (%s)", r->message, r->code);
    pg_forget_client(c->pg);
    x->req_done = true;
    if (!x->injected)
        x->keys[0] = 0; /* it was not used */
    if (told && !c->pg->cancels) {
        struct out o = login_scratch(c);
        pg_write_error(&o, sqlstate_of(why), message, detail, login_hint(why));
        conn_write(c, o.p, o.n);
    }
    xchg_try_finish(x);
}

static void finished(struct xchg *x)
{
    conn_finish(x->down, true);
}

static void resume(struct xchg *x)
{
    conn_again(x->down);
}

static void pump(struct conn *c)
{
    (void)c; /* messages of a login fit; then it is a tunnel */
}

static const struct side GUEST = {
    .fail = fail, .finished = finished, .resume = resume, .pump = pump, .lost = xchg_lost};

static enum step refuse(struct conn *c, enum reason why, const char *detail)
{
    if (!c->x.active)
        login_begin(c, "POSTGRES");
    down_fail(&c->x, why, detail);
    return STEP_STOP;
}

/* ── What may be ─────────────────────────────────────────────────────────────────────────────── */

enum reason pg_decide(struct conn *c, uint64_t *generation)
{
    return login_decide(c, &c->pg->login, generation);
}

bool postgres_may_go_on(struct conn *c, const struct snapshot *s)
{
    return login_may_go_on(c, &c->pg->login, s);
}

/* ── The guest ───────────────────────────────────────────────────────────────────────────────── */

void postgres_begin(struct conn *c)
{
    (void)pg_of(c);
    c->side = &GUEST;
    c->phase = P_POSTGRES;
    c->to.postgres = true;
    c->to.port = c->explicit_proxy ? c->loop->engine->assumed_tls_port : c->dialled_port;
}

bool postgres_hello(struct conn *c, const struct host *name, bool named)
{
    bool direct = !c->pg;
    postgres_begin(c);
    c->pg->direct = direct;
    c->pg->stage = S_STARTUP;
    if (named) {
        c->to.host = *name;
        return login_possible(c, RULE_POSTGRES);
    }
    if (!login_only_host(c, &c->pg->login, NULL)) {
        addr_text(c->dialled, c->to.host.text);
        c->to.host.len = (uint8_t)strlen(c->to.host.text);
        c->to.host.kind = HOST_IP;
        c->refused = R_PG_TLS;
    }
    return true;
}

static enum step begin_tls(struct conn *c)
{
    if (c->pg->stage != S_FIRST)
        return refuse(c, R_PG_PROTOCOL, "TLS within TLS");
    conn_write(c, "S", 1);
    c->phase = P_HELLO; /* comes back by postgres_hello */
    conn_again(c);
    return STEP_STOP;
}

static enum step deny_gss(struct conn *c)
{
    if (c->pg->stage != S_FIRST || c->pg->asked_for_gss)
        return refuse(c, R_PG_PROTOCOL, "GSSAPI encryption is requested where it cannot be");
    c->pg->asked_for_gss = true;
    conn_write(c, "N", 1);
    return STEP_AGAIN;
}

static void connect_host(struct conn *c);

static enum step begin_cancel(struct conn *c, const struct pg_startup *s)
{
    struct destination to;
    if (!find_session(c->tenant, s->process, s->secret, &to)) {
        conn_finish(c, false); /* as a server does */
        return STEP_STOP;
    }
    login_begin(c, "CANCEL");
    c->pg->cancels = true;
    c->pg->process = s->process;
    c->pg->secret = s->secret;
    c->x.to = to;
    enum reason why = login_within_limits(c);
    if (why != R_NONE)
        return refuse(c, why, NULL);
    connect_host(c);
    return STEP_STOP;
}

static void copy_name(char *out, struct str name)
{
    memcpy(out, name.p, name.n); /* shorter, see pgwire.c */
    out[name.n] = 0;
}

/* Before the guest is authenticated; what it would have to wait for is decided afterwards. */
static enum reason check_login(struct conn *c)
{
    uint64_t generation;
    enum reason why = login_within_limits(c);
    if (why != R_NONE)
        return why;
    why = pg_decide(c, &generation);
    if (c->refused && c->x.ruled.decision != D_DENIED) /* by a rule, which says more */
        return c->refused;
    return why == R_APPROVAL_PENDING || why == R_CREDENTIAL ? R_NONE : why;
}

static enum reason read_verifier(struct conn *c)
{
    uint64_t generation;
    const struct rule *r;
    struct snapshot *s = tenant_borrow(c->tenant, &generation);
    enum reason why = s ? login_find(c, &c->pg->login, s, &r) : R_UNREGISTERED;
    if (why == R_NONE && !scram_verifier_read(&c->pg->verifier, r->extra[LOGIN_VERIFIER]))
        why = R_CREDENTIAL;
    snapshot_release(s);
    return why;
}

static enum step log_in(struct conn *c, const struct pg_startup *s)
{
    static const char PLUS[] = SCRAM_PLUS "\0" SCRAM "\0";
    struct postgres *pg = c->pg;
    struct out o = login_scratch(c);
    login_begin(c, "POSTGRES");
    copy_name(pg->login.user, s->user);
    copy_name(pg->login.database, s->database);
    pg_write_startup(&o, s);
    char *startup = malloc(o.n);
    if (!startup)
        abort();
    memcpy(startup, o.p, o.n);
    pg->startup = (struct str){startup, (uint32_t)o.n};
    enum reason why = check_login(c);
    if (why == R_NONE)
        why = read_verifier(c);
    if (why != R_NONE)
        return refuse(c, why, NULL);
    o = login_scratch(c);
    if (s->version != PG_VERSION_3_0 || s->options)
        pg_write_negotiation(&o, s);
    pg_write_authentication(&o, PG_AUTH_SASL, (struct str){PLUS, sizeof PLUS});
    conn_write(c, o.p, o.n);
    pg->stage = S_SASL;
    return STEP_AGAIN;
}

static enum step read_startup(struct conn *c)
{
    struct pg_startup s;
    enum step step = STEP_MORE;
    enum pg_read got = buf_size(&c->in) ? pg_read_startup(c->in.p + c->in.off, buf_size(&c->in), &s) : PG_MORE;
    if (got == PG_MORE)
        return STEP_MORE;
    if (got == PG_BAD)
        return refuse(c, R_PG_PROTOCOL, "the first message is malformed, or too long");
    switch (s.kind) {
    case PG_WANTS_TLS:
        step = begin_tls(c);
        break;
    case PG_WANTS_GSS:
        step = deny_gss(c);
        break;
    case PG_CANCEL:
        step = begin_cancel(c, &s);
        break;
    case PG_OTHER_VERSION:
        step = refuse(c, R_PG_PROTOCOL, "only version 3 of the protocol is supported");
        break;
    case PG_STARTUP:
        step = c->pg->stage == S_FIRST ? refuse(c, R_PG_TLS, NULL) : log_in(c, &s);
        break;
    }
    if (!c->dead)
        buf_take(c->loop, &c->in, s.size);
    return step;
}

static struct scram_binding our_binding(const struct conn *c)
{
    return scram_binding_of(SSL_get_certificate(c->ssl));
}

static bool take_initial(struct conn *c, struct str body)
{
    struct postgres *pg = c->pg;
    struct str mechanism, data;
    if (!pg_read_sasl_initial(body, &mechanism, &data))
        return false;
    bool plus = mechanism.n == sizeof SCRAM_PLUS - 1;
    const char *name = plus ? SCRAM_PLUS : SCRAM;
    struct scram_binding binding = our_binding(c);
    if (mechanism.n != strlen(name) || memcmp(mechanism.p, name, mechanism.n) != 0
        || !scram_server_begin(&pg->guest, &pg->verifier, plus, &binding, data, NULL))
        return false;
    struct out o = login_scratch(c);
    pg_write_authentication(&o, PG_AUTH_SASL_CONTINUE, (struct str){pg->guest.first.p, pg->guest.first.n});
    conn_write(c, o.p, o.n);
    pg->stage = S_PROOF;
    return true;
}

static bool take_proof(struct conn *c, struct str body)
{
    struct postgres *pg = c->pg;
    if (!scram_server_trusts(&pg->guest, &pg->verifier, body))
        return false;
    struct out o = login_scratch(c);
    pg_write_authentication(&o, PG_AUTH_SASL_FINAL, (struct str){pg->guest.final.p, pg->guest.final.n});
    conn_write(c, o.p, o.n);
    pg->stage = S_HOST;
    return true;
}

static enum step read_password(struct conn *c)
{
    struct pg_message m;
    enum pg_read got =
        buf_size(&c->in) ? pg_read_message(c->in.p + c->in.off, buf_size(&c->in), GUEST_MESSAGE, &m) : PG_MORE;
    if (got == PG_MORE)
        return STEP_MORE;
    if (got == PG_BAD || m.type != 'p')
        return refuse(c, R_PG_PROTOCOL, "a message of the login is malformed, or too long");
    bool initial = c->pg->stage == S_SASL, good = initial ? take_initial(c, m.body) : take_proof(c, m.body);
    if (!good)
        return refuse(c, initial ? R_PG_PROTOCOL : R_LOGIN_PASSWORD,
                      initial ? "a message of SCRAM is malformed" : "it is sent by SCRAM-SHA-256");
    buf_take(c->loop, &c->in, m.size);
    if (!initial)
        connect_host(c);
    return initial ? STEP_AGAIN : STEP_STOP;
}

/* As far as the rules allow now; else it is held until they do. */
static void connect_host(struct conn *c)
{
    struct xchg *x = &c->x;
    uint64_t generation = atomic_load(&c->tenant->generation);
    c->pg->stage = S_HOST;
    conn_timer(c, -1);
    enum reason why = c->pg->cancels ? R_NONE : pg_decide(c, &generation);
    if (why == R_NONE) {
        if (up_take(x, generation, false, true) == TAKE_FULL)
            (void)refuse(c, R_BUSY, NULL);
    } else if (why == R_CREDENTIAL) {
        xchg_hold(x, why);
    } else if (why != R_APPROVAL_PENDING) {
        (void)refuse(c, why, NULL);
    } else if (!xchg_ask(x, str_of("*"))) {
        (void)refuse(c, R_BUSY, NULL);
    }
}

/* It has logged in here and waits. */
static enum step wait_for_host(struct conn *c)
{
    struct xchg *x = &c->x;
    if (c->hung_up || c->readable_end) {
        conn_lost(c);
        return STEP_STOP;
    }
    if (x->active && !x->waiting && !x->up)
        connect_host(c);
    else if (x->up && c->pg->host == H_NEW)
        pg_begin_host(x->up);
    return STEP_STOP;
}

static enum step one_step(struct conn *c)
{
    switch (c->pg->stage) {
    case S_FIRST:
    case S_STARTUP:
        return read_startup(c);
    case S_SASL:
    case S_PROOF:
        return read_password(c);
    default:
        return wait_for_host(c);
    }
}

void postgres_run(struct conn *c)
{
    login_run(c, P_POSTGRES, one_step);
}
