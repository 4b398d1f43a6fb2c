/* Logins to MySQL and MariaDB: the guest proves that it has the placeholder, the host is shown the password.
 *
 *   guest                                    engine                                        host
 *   connects                            →    the host of the rules for this port, connected to →
 *                                       ←    greeting, with a challenge of ours           ←    greeting
 *   SSLRequest and TLS, if it wants     →    leaf for the server name
 *   user, database, answer              →    user, where it may go, the answer
 *                                            SSLRequest, TLS verified for the same name    →
 *                                            user, database, answer by the password       ←→
 *   OK                                  ←    tunnel (splice.c)                            ←    OK
 *
 * The server speaks first in this protocol, so a guest waits to be greeted before anybody knows whom it means. If only one
 * host can be meant, its own greeting is passed on: clients go by the version in it, by what it is capable of, and by the
 * number of the session, which a client names on another connection to end a query. Otherwise we greet for a server as there
 * are many, and the server name in TLS or the user says which host it is.
 *
 * The host's greeting comes before TLS and could be anybody's. Of it the guest sees a printable version, numbers, and
 * capabilities that we know; what the guest does with them harms nobody else. Our answer to its challenge is sent over
 * TLS only, like everything else, unless the rule says otherwise.
 */
#define _GNU_SOURCE
#include <openssl/crypto.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mysql.h"

/* ── Refusals ────────────────────────────────────────────────────────────────────────────────── */

struct my_code {
    unsigned code;
    const char *state;
};

static struct my_code code_of(enum reason why)
{
    switch (why) {
    case R_MY_PROTOCOL:
        return (struct my_code){1043, "08S01"}; /* ER_HANDSHAKE_ERROR */
    case R_RATE:
    case R_BUSY:
        return (struct my_code){1040, "08004"}; /* ER_CON_COUNT_ERROR */
    case R_CREDENTIAL:
    case R_DRAINING:
        return (struct my_code){1053, "08S01"}; /* ER_SERVER_SHUTDOWN */
    default:
        break;
    }
    /* ER_CONNECT_TO_FOREIGN_DATA_SOURCE, ER_ACCESS_DENIED_ERROR */
    return REASONS[why].status >= 500 ? (struct my_code){1429, "HY000"} : (struct my_code){1045, "28000"};
}

static void tell(struct conn *c)
{
    const struct mysql *my = c->my;
    struct out o = login_scratch(c);
    my_write_error(&o, my->sequence, my->failure_code, my->stage == M_NEW ? NULL : my->failure_state, my->failure);
    conn_write(c, o.p, o.n);
    c->x.req_done = true;
    xchg_try_finish(&c->x);
}

static void fail(struct xchg *x, enum reason why, const char *detail, bool told)
{
    struct conn *c = x->down;
    struct mysql *my = c->my;
    const struct reason_text *r = &REASONS[why];
    struct my_code code = code_of(why);
    bool more = detail && *detail;
    (void)told; /* it is, once the session has begun it is a tunnel */
    (void)snprintf(my->failure, sizeof my->failure, "hypeman: %s (%s)%s%s; %s", r->message, r->code, more ? ": " : "",
                   more ? detail : "", login_hint(why));
    my->failure_code = code.code;
    my->failure_state = code.state;
    if (!x->injected)
        x->keys[0] = 0; /* it was not used */
    my->failed = my->stage != M_NEW && my->stage != M_HOST && !my->refusing;
    if (!my->failed)
        tell(c);
}

static void finished(struct xchg *x)
{
    conn_finish(x->down, x->down->phase == P_MYSQL);
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
    c->my->refusing = true;
    down_fail(&c->x, why, detail);
    return STEP_STOP;
}

/* ── Its beginning and its end ───────────────────────────────────────────────────────────────── */

static uint16_t port_of(const struct conn *c)
{
    return c->explicit_proxy ? c->loop->engine->assumed_tls_port : c->dialled_port;
}

bool mysql_waits(struct conn *c)
{
    uint64_t generation;
    struct snapshot *s = tenant_borrow(c->tenant, &generation);
    bool waits = s && snapshot_greets(s, port_of(c));
    snapshot_release(s);
    return waits;
}

void mysql_begin(struct conn *c)
{
    struct mysql *my = c->my = calloc(1, sizeof *my);
    if (!my)
        abort(); /* nothing sensible is left to do without memory */
    my->login.kind = RULE_MYSQL;
    my->login.method = "MYSQL";
    my->named = c->connected;
    c->side = &GUEST;
    c->phase = P_MYSQL;
    c->to.mysql = c->to.tls = true;
    if (!my->named)
        c->to.port = port_of(c);
}

void mysql_end(struct conn *c)
{
    if (!c->my)
        return;
    if (c->x.active && c->phase != P_TUNNEL)
        xchg_lost(c);
    free((char *)c->my->response.p);
    free(c->my);
    c->my = NULL;
}

bool mysql_may_go_on(struct conn *c, const struct snapshot *s)
{
    return login_may_go_on(c, &c->my->login, s);
}

/* ── The greeting ────────────────────────────────────────────────────────────────────────────── */

void my_greet(struct conn *c, const struct my_greeting *theirs)
{
    struct mysql *my = c->my;
    struct my_greeting g = *theirs;
    bool native = str_is(g.plugin, MY_NATIVE);
    my->offered = (g.capabilities & MY_PASSED) | MY_SSL | MY_PLUGINS | MY_LONG_ANSWER | MY_SECURE | MY_PROTOCOL_41;
    my->offered_further = g.further & MY_PASSED_FURTHER;
    my->plugin = native ? MY_NATIVE : MY_SHA2;
    scramble_new(my->scramble);
    memcpy(g.scramble, my->scramble, MY_SCRAMBLE);
    g.capabilities = my->offered;
    g.further = my->offered_further;
    g.plugin = str_of(my->plugin);
    struct out o = login_scratch(c);
    my_write_greeting(&o, &g);
    conn_write(c, o.p, o.n);
    my->sequence = 1;
    my->stage = M_GREETED;
    conn_timer(c, T_HEAD);
    conn_again(c);
}

/* For a host that is not known yet, or not connected to. No session has its number, so that no query is ended by it. */
static void greet_for_any(struct conn *c)
{
    struct my_greeting g = {.thread = UINT32_MAX, .capabilities = MY_USUAL, .charset = 45, .status = 2};
    g.version = str_of("8.0.0-hypeman");
    g.plugin = str_of(MY_SHA2);
    my_greet(c, &g);
}

/* Only as far as its rules are sure to allow it before it has said who it is. */
static bool may_connect(struct conn *c, uint64_t *generation)
{
    struct snapshot *s = tenant_borrow(c->tenant, generation);
    const struct mysql *my = c->my;
    bool may = s && snapshot_logs_in(s, RULE_MYSQL, &c->to.host, c->to.port)
        && login_allowed(c, &my->login, s, &c->x.ruled) == R_NONE;
    snapshot_release(s);
    return may;
}

static enum step begin(struct conn *c)
{
    struct mysql *my = c->my;
    uint64_t generation;
    login_begin(c, my->login.method);
    enum reason why = login_within_limits(c);
    if (why != R_NONE)
        return refuse(c, why, NULL);
    my->named = my->named || login_only_host(c, &my->login, NULL);
    c->x.to = c->to;
    if (!my->named || !may_connect(c, &generation)) {
        greet_for_any(c);
        return STEP_AGAIN;
    }
    conn_timer(c, -1);
    if (up_take(&c->x, generation, false, true) == TAKE_FULL)
        return refuse(c, R_BUSY, NULL);
    return STEP_STOP;
}

void mysql_hello(struct conn *c, const struct host *name, bool named)
{
    struct mysql *my = c->my;
    if (!named) {
        if (my->named)
            return;
        addr_text(c->dialled, c->to.host.text); /* for the leaf */
        c->to.host.len = (uint8_t)strlen(c->to.host.text);
        c->to.host.kind = HOST_IP;
        return;
    }
    if (my->named && (name->len != c->to.host.len || memcmp(name->text, c->to.host.text, name->len) != 0)) {
        /* The one that was connected to is not the one that is meant; there may be no rule for that. */
        up_abandon(&c->x);
        my->host = MH_NEW;
    }
    c->to.host = *name;
    c->x.to.host = *name;
    my->named = true;
}

/* ── The login ───────────────────────────────────────────────────────────────────────────────── */

static void connect_host(struct conn *c);

static void copy_text(char *out, size_t cap, struct str s)
{
    size_t n = s.n < cap - 1 ? s.n : cap - 1;
    memcpy(out, s.p, n);
    out[n] = 0;
}

static bool keep_response(struct mysql *my, struct str body)
{
    char *kept = malloc(body.n);
    if (!kept)
        abort();
    memcpy(kept, body.p, body.n);
    my->response = (struct str){kept, body.n};
    return my_read_login(my->response, &my->answered);
}

/* What the guest would have to wait for is decided when it is authenticated. */
static enum reason check_login(struct conn *c)
{
    struct mysql *my = c->my;
    uint64_t generation;
    if (!my->named) {
        my->named = login_only_host(c, &my->login, my->login.user);
        c->x.to.host = c->to.host;
    }
    enum reason why = my->named ? login_decide(c, &my->login, &generation) : R_MY_HOST;
    if (c->refused && c->x.ruled.decision != D_DENIED) /* by a rule, which says more */
        return c->refused;
    return why == R_APPROVAL_PENDING || why == R_CREDENTIAL ? R_NONE : why;
}

static bool has_placeholder(struct conn *c, struct str plugin, struct str answer)
{
    uint64_t generation;
    const struct rule *r;
    unsigned char expected[SHA2_ANSWER];
    struct snapshot *s = tenant_borrow(c->tenant, &generation);
    bool found = s && login_find(c, &c->my->login, s, &r) == R_NONE;
    unsigned n = found ? scramble_answer(plugin, r->placeholder, c->my->scramble, expected) : 0;
    snapshot_release(s);
    return n && answer.n == n && CRYPTO_memcmp(answer.p, expected, n) == 0;
}

static enum step admit(struct conn *c, struct str plugin)
{
    c->my->known = true;
    c->my->by_sha2 = str_is(plugin, MY_SHA2);
    connect_host(c);
    return STEP_STOP;
}

/* A client that has another way in mind sends its name, and no answer, or one that is for another challenge. */
static enum step ask_again(struct conn *c, struct str plugin)
{
    struct mysql *my = c->my;
    my->plugin = str_is(plugin, MY_NATIVE) ? MY_NATIVE : MY_SHA2;
    scramble_new(my->scramble);
    struct out o = login_scratch(c);
    my_write_switch(&o, my->sequence++, my->plugin, my->scramble);
    conn_write(c, o.p, o.n);
    my->stage = M_SWITCHED;
    return STEP_AGAIN;
}

static enum step tell_now(struct conn *c)
{
    tell(c);
    return STEP_STOP;
}

static enum step log_in(struct conn *c)
{
    struct mysql *my = c->my;
    struct my_login *l = &my->answered;
    copy_text(my->login.user, sizeof my->login.user, l->user);
    l->capabilities &= my->offered;
    l->further &= my->offered_further;
    if (my->failed)
        return tell_now(c);
    enum reason why = check_login(c);
    if (why != R_NONE)
        return refuse(c, why, NULL);
    struct str plugin = l->capabilities & MY_PLUGINS ? l->plugin : str_of(MY_NATIVE);
    if (has_placeholder(c, plugin, l->answer))
        return admit(c, plugin);
    if (str_is(plugin, my->plugin))
        return refuse(c, R_LOGIN_PASSWORD, NULL);
    if (!(l->capabilities & MY_PLUGINS))
        return refuse(c, R_LOGIN_PASSWORD, "the client can only show it by mysql_native_password");
    return ask_again(c, plugin);
}

static enum step begin_tls(struct conn *c, size_t size)
{
    if (c->my->stage != M_GREETED)
        return refuse(c, R_MY_PROTOCOL, "TLS within TLS");
    buf_take(c->loop, &c->in, size);
    c->my->stage = M_TLS;
    c->phase = P_HELLO; /* comes back by mysql_hello, unless it is connected by name */
    conn_again(c);
    return STEP_STOP;
}

static enum step read_login(struct conn *c, const struct my_packet *m)
{
    struct my_login l;
    struct mysql *my = c->my;
    if (!my_read_login(m->body, &l))
        return refuse(c, R_MY_PROTOCOL, "the first packet is malformed");
    if (l.wants_tls)
        return begin_tls(c, m->size);
    if ((l.capabilities & MY_SSL && my->stage == M_GREETED) || !keep_response(my, m->body))
        return refuse(c, R_MY_PROTOCOL, "it announces TLS and does not begin it");
    buf_take(c->loop, &c->in, m->size);
    return log_in(c);
}

static enum step read_answer(struct conn *c, const struct my_packet *m)
{
    struct str plugin = str_of(c->my->plugin);
    bool good = has_placeholder(c, plugin, m->body);
    buf_take(c->loop, &c->in, m->size);
    if (c->my->failed)
        return tell_now(c);
    return good ? admit(c, plugin) : refuse(c, R_LOGIN_PASSWORD, NULL);
}

static enum step read_guest(struct conn *c)
{
    struct my_packet m;
    struct mysql *my = c->my;
    size_t n = buf_size(&c->in), most = my->stage == M_SWITCHED ? MY_ANSWER_MAX : MY_LOGIN_MAX;
    enum my_read got = n ? my_read_packet(c->in.p + c->in.off, n, most, &m) : MY_MORE;
    if (got == MY_MORE)
        return STEP_MORE;
    if (got == MY_BAD || m.sequence != my->sequence)
        return refuse(c, R_MY_PROTOCOL, "a packet of the login is too long, or out of order");
    my->sequence++;
    return my->stage == M_SWITCHED ? read_answer(c, &m) : read_login(c, &m);
}

/* Servers close connections that do not log in within seconds. */
static void leave_host(struct conn *c)
{
    up_abandon(&c->x);
    c->my->host = MH_NEW;
}

/* As far as the rules allow now; else it is held until they do. */
static void connect_host(struct conn *c)
{
    struct xchg *x = &c->x;
    uint64_t generation = atomic_load(&c->tenant->generation);
    c->my->stage = M_HOST;
    conn_timer(c, -1);
    enum reason why = login_decide(c, &c->my->login, &generation);
    if (why == R_NONE) {
        if (x->up)
            my_begin_host(x->up);
        else if (up_take(x, generation, false, true) == TAKE_FULL)
            (void)refuse(c, R_BUSY, NULL);
    } else if (why != R_CREDENTIAL && why != R_APPROVAL_PENDING) {
        (void)refuse(c, why, NULL);
    } else {
        leave_host(c);
        if (why == R_CREDENTIAL)
            xchg_hold(x, why);
        else if (!xchg_ask(x, str_of("*")))
            (void)refuse(c, R_BUSY, NULL);
    }
}

static void begin_to_listen(struct conn *up, struct mysql *my)
{
    my->host = MH_GREETING;
    my->host_sequence = 0;
    conn_timer(up, T_HANDSHAKE);
    conn_again(up);
}

/* It waits, to be greeted or to be let in. */
static enum step wait_for_host(struct conn *c)
{
    struct xchg *x = &c->x;
    struct mysql *my = c->my;
    if (c->hung_up || c->readable_end) {
        conn_lost(c);
        return STEP_STOP;
    }
    if (!x->active || x->waiting)
        return STEP_STOP;
    if (x->up && my->host == MH_NEW)
        begin_to_listen(x->up, my);
    else if (x->up && my->host == MH_SHAKING && x->up->phase == P_MYSQL)
        my_log_in_host(x->up);
    else if (my->stage == M_HOST && (!x->up || my->host == MH_GREETED))
        connect_host(c);
    return STEP_STOP;
}

static enum step one_step(struct conn *c)
{
    switch (c->my->stage) {
    case M_NEW:
        return c->x.active ? wait_for_host(c) : begin(c);
    case M_HOST:
        return wait_for_host(c);
    default:
        return read_guest(c);
    }
}

void mysql_run(struct conn *c)
{
    login_run(c, P_MYSQL, one_step);
}
