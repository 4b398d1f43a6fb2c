/* Logins to MySQL and MariaDB, the host's side: its greeting, TLS, the password. See mydown.c. */
#define _GNU_SOURCE
#include <openssl/crypto.h>
#include <stdio.h>
#include <string.h>

#include "mysql.h"

enum { HEARD_MAX = 64 * 1024 }; /* bytes of the host until the session is ready */

static struct mysql *of(const struct conn *up)
{
    return up->one->down->my;
}

/* ── The greeting ────────────────────────────────────────────────────────────────────────────── */

static struct str keep(char *out, struct str s)
{
    memcpy(out, s.p, s.n); /* shorter, see mywire.c */
    out[s.n] = 0;
    return (struct str){out, s.n};
}

/* In clear, so that only its number is passed on. */
static enum step refused_at_once(struct conn *up, struct str body)
{
    unsigned code;
    struct str state;
    char detail[64];
    if (!my_read_error(body, &code, &state))
        return login_give_up(up, R_UPSTREAM_RESPONSE, "it does not greet as MySQL does");
    (void)snprintf(detail, sizeof detail, "it refuses the connection with error %u", code);
    return login_give_up(up, R_UPSTREAM_CLOSED, detail);
}

static enum step take_greeting(struct conn *up, const struct my_packet *m)
{
    struct conn *c = up->one->down;
    struct mysql *my = c->my;
    if (m->sequence != 0 || my_kind(m->body) == MY_KIND_ERROR || !my_read_greeting(m->body, &my->theirs))
        return refused_at_once(up, m->body);
    my->theirs.version = keep(my->version, my->theirs.version);
    my->theirs.plugin = keep(my->their_plugin, my->theirs.plugin);
    my->host = MH_GREETED;
    buf_take(up->loop, &up->in, m->size);
    conn_timer(up, -1); /* it is the guest's turn, whose time is limited too */
    if (my->stage == M_NEW)
        my_greet(c, &my->theirs);
    else
        conn_again(c);
    return STEP_AGAIN;
}

/* ── Ours ────────────────────────────────────────────────────────────────────────────────────── */

static bool accepts(const struct rule *r, struct str plugin)
{
    struct str method = r->extra[LOGIN_METHOD];
    if (str_is(plugin, MY_SHA2))
        return true;
    if (str_is(plugin, MY_NATIVE))
        return str_is(method, "native") || str_is(method, "clear");
    return str_is(plugin, MY_CLEAR) && str_is(method, "clear");
}

/* What the guest asked for, as far as this host can do it; the same in both packets that have it. */
static struct my_login login_of(const struct mysql *my, bool tls)
{
    struct my_login l = my->answered;
    const struct my_greeting *g = &my->theirs;
    l.capabilities &= MY_PASSED & g->capabilities & ~(MY_SSL | MY_LONG_ANSWER | MY_PLUGINS);
    l.capabilities |= MY_PROTOCOL_41 | MY_SECURE | (g->capabilities & MY_PLUGINS) | (tls ? MY_SSL : 0);
    l.further &= g->further;
    if (!l.database.n)
        l.capabilities &= ~MY_WITH_DATABASE;
    else
        l.capabilities |= MY_WITH_DATABASE;
    return l;
}

void my_begin_host(struct conn *up)
{
    struct conn *c = up->one->down;
    struct mysql *my = c->my;
    struct out o = login_scratch(up);
    if (buf_size(&up->in)) {
        up_failed(up, R_UPSTREAM_RESPONSE, "it goes on before it is answered");
        return;
    }
    conn_timer(up, T_HANDSHAKE);
    if (!c->x.to.tls) {
        my->host = MH_SHAKING;
        my_log_in_host(up);
        return;
    }
    if (!(my->theirs.capabilities & MY_SSL)) {
        up_failed(up, R_UPSTREAM_TLS, "the server does not offer TLS");
        return;
    }
    struct my_login l = login_of(my, true);
    l.wants_tls = true;
    my_write_login(&o, 1, &l);
    conn_write(up, o.p, o.n);
    my->host = MH_SHAKING;
    up_begin_tls(up);
}

static void note_use(struct conn *up)
{
    of(up)->proved = true;
    login_note_use(up);
}

void my_log_in_host(struct conn *up)
{
    struct snapshot *s;
    struct mysql *my = of(up);
    unsigned char answer[SHA2_ANSWER];
    const struct rule *r = login_password_rule(up, &of(up)->login, &s);
    if (!r)
        return;
    /* What the server names is its default, and may not be the account's: if we cannot do it, it will ask for that. */
    struct str plugin = my->theirs.plugin.n ? my->theirs.plugin : str_of(MY_NATIVE);
    if (!accepts(r, plugin) || str_is(plugin, MY_CLEAR))
        plugin = str_of(MY_SHA2);
    struct my_login l = login_of(my, up->ssl != NULL);
    unsigned n = scramble_answer(plugin, r->value, my->theirs.scramble, answer);
    l.plugin = plugin;
    l.answer = (struct str){(const char *)answer, n};
    my->host_sequence = up->ssl ? 2 : 1;
    struct out o = login_scratch(up);
    my_write_login(&o, my->host_sequence++, &l);
    (void)conn_secret(up, o.p, o.n);
    OPENSSL_cleanse(o.p, o.n);
    OPENSSL_cleanse(answer, sizeof answer);
    snapshot_release(s);
    note_use(up);
    my->asked_by_sha2 = str_is(plugin, MY_SHA2);
    my->host = MH_ASKED;
    conn_timer(up, T_HANDSHAKE);
    conn_again(up);
}

/* ── Its answers ─────────────────────────────────────────────────────────────────────────────── */

static void send_password(struct conn *up, const struct rule *r)
{
    struct mysql *my = of(up);
    struct out o = login_scratch(up);
    const uint32_t n = r->value.n + 1;
    out_add(&o, (const char[]){(char)n, (char)(n >> 8), (char)(n >> 16), (char)my->host_sequence++}, MY_HEADER);
    out_add(&o, r->value.p, r->value.n);
    out_add(&o, "", 1);
    (void)conn_secret(up, o.p, o.n);
    OPENSSL_cleanse(o.p, o.n);
}

static enum step refuse_plugin(struct conn *up, struct str plugin)
{
    char detail[200];
    bool known = str_is(plugin, MY_NATIVE) || str_is(plugin, MY_CLEAR);
    (void)snprintf(detail, sizeof detail, "the account authenticates by %.*s, which %s", (int)plugin.n, plugin.p,
                   known ? "the rule does not accept (auth)"
                         : "is not supported; caching_sha2_password and mysql_native_password are");
    return login_give_up(up, R_LOGIN_UPSTREAM, detail);
}

static enum step switch_plugin(struct conn *up, struct str body)
{
    struct snapshot *s;
    struct str plugin, data;
    struct mysql *my = of(up);
    unsigned char answer[SHA2_ANSWER];
    if (body.n == 1)
        return refuse_plugin(up, str_of("mysql_old_password"));
    if (my->switched || !my_read_switch(body, &plugin, &data))
        return login_give_up(up, R_UPSTREAM_RESPONSE, NULL);
    const struct rule *r = login_password_rule(up, &of(up)->login, &s);
    if (!r)
        return STEP_STOP;
    bool clear = str_is(plugin, MY_CLEAR), good = accepts(r, plugin) && (!clear || up->ssl);
    if (good && clear) {
        send_password(up, r);
    } else if (good && data.n == MY_SCRAMBLE) {
        struct out o = login_scratch(up);
        unsigned n = scramble_answer(plugin, r->value, data.p, answer);
        my_write(&o, my->host_sequence++, (struct str){(const char *)answer, n});
        (void)conn_secret(up, o.p, o.n);
        OPENSSL_cleanse(o.p, o.n);
        OPENSSL_cleanse(answer, sizeof answer);
    }
    snapshot_release(s);
    if (!good)
        return refuse_plugin(up, plugin);
    if (!clear && data.n != MY_SCRAMBLE)
        return login_give_up(up, R_UPSTREAM_RESPONSE, NULL);
    my->switched = true;
    my->asked_by_sha2 = str_is(plugin, MY_SHA2);
    note_use(up);
    return STEP_AGAIN;
}

static enum step take_more(struct conn *up, struct str body)
{
    struct snapshot *s;
    struct mysql *my = of(up);
    if (!my->asked_by_sha2 || body.n != 2 || (body.p[1] != MY_SHA2_DONE && body.p[1] != MY_SHA2_WANTED))
        return login_give_up(up, R_UPSTREAM_RESPONSE, NULL);
    my->asked_by_sha2 = false; /* once */
    if (body.p[1] == MY_SHA2_DONE)
        return STEP_AGAIN;
    if (!up->ssl)
        return login_give_up(up, R_LOGIN_UPSTREAM,
                             "it wants the password itself, which is sent over TLS only; log in once over TLS");
    const struct rule *r = login_password_rule(up, &of(up)->login, &s);
    if (!r)
        return STEP_STOP;
    send_password(up, r);
    snapshot_release(s);
    return STEP_AGAIN;
}

/* What a server says over TLS verified for its name is the guest's as it is. */
static void pass_to_guest(struct conn *c, struct str body)
{
    static const char DONE[] = {MY_KIND_MORE, MY_SHA2_DONE};
    struct mysql *my = c->my;
    struct out o = login_scratch(c);
    if (my->by_sha2 && my_kind(body) == MY_KIND_OK)
        my_write(&o, my->sequence++, (struct str){DONE, sizeof DONE});
    my_write(&o, my->sequence++, body);
    conn_write(c, o.p, o.n);
    c->x.down_bytes += o.n;
}

static enum step pass_refusal(struct conn *up, struct str body)
{
    struct xchg *x = up->one;
    unsigned code;
    struct str state;
    if (!my_read_error(body, &code, &state))
        return login_give_up(up, R_UPSTREAM_RESPONSE, NULL);
    x->status = state.n == 5 && memcmp(state.p, "28", 2) == 0 ? 401 : 503;
    pass_to_guest(x->down, body);
    up->one = NULL;
    x->up = NULL;
    conn_kill(up);
    x->req_done = x->resp_done = true;
    xchg_try_finish(x);
    return STEP_STOP;
}

/* The rules may have changed while it was on its way. */
static enum step welcome(struct conn *up, const struct my_packet *m)
{
    struct xchg *x = up->one;
    struct conn *c = x->down;
    enum reason why = login_decide(c, &c->my->login, &up->generation);
    if (why == R_NONE && x->to.tls && !up->ssl)
        why = R_UPSTREAM_TLS;
    if (why != R_NONE)
        return login_give_up(up, why, NULL);
    pass_to_guest(c, m->body);
    buf_take(up->loop, &up->in, m->size);
    x->status = 200;
    x->resp_started = true;
    tunnel_begin(c, up);
    return STEP_STOP;
}

static enum step take_packet(struct conn *up, const struct my_packet *m)
{
    struct mysql *my = of(up);
    enum step step = STEP_STOP;
    if (my->host == MH_GREETING)
        return take_greeting(up, m);
    if (my->host != MH_ASKED || m->sequence != my->host_sequence)
        return login_give_up(up, R_UPSTREAM_RESPONSE, "a packet is out of order");
    my->host_sequence++;
    switch (my_kind(m->body)) {
    case MY_KIND_OK:
        return welcome(up, m);
    case MY_KIND_ERROR:
        return pass_refusal(up, m->body);
    case MY_KIND_SWITCH:
        step = switch_plugin(up, m->body);
        break;
    case MY_KIND_MORE:
        step = take_more(up, m->body);
        break;
    default:
        return login_give_up(up, R_UPSTREAM_RESPONSE, NULL);
    }
    if (!up->dead)
        buf_take(up->loop, &up->in, m->size);
    return step;
}

static enum step host_step(struct conn *up)
{
    struct my_packet m;
    size_t n = buf_size(&up->in);
    switch (n ? my_read_packet(up->in.p + up->in.off, n, MY_PACKET_MAX, &m) : MY_MORE) {
    case MY_BAD:
        return login_give_up(up, R_UPSTREAM_RESPONSE, NULL);
    case MY_OK:
        return take_packet(up, &m);
    default:
        return STEP_MORE;
    }
}

void mysql_host_run(struct conn *up)
{
    for (;;) {
        if (up->dead || !up->one || up->phase != P_MYSQL || of(up)->host == MH_NEW || of(up)->host == MH_SHAKING)
            return;
        enum step s = host_step(up);
        if (s == STEP_AGAIN)
            continue;
        if (s == STEP_STOP)
            return;
        ssize_t n = conn_read(up);
        if (n == 0)
            return;
        of(up)->heard += n > 0 ? (size_t)n : 0;
        if (of(up)->heard > HEARD_MAX || n < 0) {
            up_failed(up, n < 0 ? R_UPSTREAM_CLOSED : R_UPSTREAM_RESPONSE,
                      n < 0 ? NULL : "it says too much before the session is ready");
            return;
        }
    }
}
