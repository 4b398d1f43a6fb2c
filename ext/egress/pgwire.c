/* See pgwire.h. */
#include "pgwire.h"

#include <string.h>

static uint32_t number_at(const char *p)
{
    const unsigned char *b = (const unsigned char *)p;
    return (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
}

/* A text that ends with a zero byte, cut off the front. */
static bool take_text(struct str *from, struct str *out)
{
    const char *end = from->n ? memchr(from->p, 0, from->n) : NULL;
    if (!end)
        return false;
    *out = (struct str){from->p, (uint32_t)(end - from->p)};
    from->n -= out->n + 1;
    from->p = end + 1;
    return true;
}

static bool starts(struct str s, const char *text)
{
    size_t n = strlen(text);
    return s.n >= n && memcmp(s.p, text, n) == 0;
}

/* Parameters that the server takes the last one of, so that it could read another than we. */
static bool note_parameter(struct pg_startup *s, struct str name, struct str value)
{
    if (str_is(name, "user") || str_is(name, "database")) {
        struct str *mine = name.p[0] == 'u' ? &s->user : &s->database;
        if (mine->p)
            return false;
        *mine = value;
        return true;
    }
    if (starts(name, "_pq_.")) {
        if (s->options == PG_PARAMETERS)
            return false;
        s->option[s->options++] = name;
        return true;
    }
    for (unsigned i = 0; i < s->n; i++)
        if (s->name[i].n == name.n && memcmp(s->name[i].p, name.p, name.n) == 0)
            return false;
    if (s->n == PG_PARAMETERS)
        return false;
    s->physical |= str_is(name, "replication") && !str_is(value, "database");
    s->name[s->n] = name;
    s->value[s->n++] = value;
    return true;
}

static bool read_parameters(struct str rest, struct pg_startup *s)
{
    struct str name, value;
    while (rest.n > 1) {
        if (!take_text(&rest, &name) || !name.n || !take_text(&rest, &value) || !note_parameter(s, name, value))
            return false;
    }
    if (rest.n != 1 || rest.p[0] != 0)
        return false;
    if (!s->database.n) /* as the server does */
        s->database = s->user;
    if (s->physical)
        s->database.n = 0;
    return s->user.n && s->user.n < PG_NAME_MAX && s->database.n < PG_NAME_MAX;
}

enum pg_read pg_read_startup(const char *p, size_t n, struct pg_startup *out)
{
    memset(out, 0, sizeof *out);
    if (n && p[0])
        return PG_BAD; /* longer than any may be */
    if (n < 4)
        return PG_MORE;
    out->size = number_at(p);
    if (out->size < 8 || out->size > PG_STARTUP_MAX)
        return PG_BAD;
    if (n < out->size)
        return PG_MORE;
    uint32_t code = number_at(p + 4);
    switch (code) {
    case PG_SSL_REQUEST:
    case PG_GSS_REQUEST:
        out->kind = code == PG_SSL_REQUEST ? PG_WANTS_TLS : PG_WANTS_GSS;
        return out->size == 8 ? PG_OK : PG_BAD;
    case PG_CANCEL_REQUEST:
        if (out->size != 16)
            return PG_BAD;
        out->kind = PG_CANCEL;
        out->process = number_at(p + 8);
        out->secret = number_at(p + 12);
        return PG_OK;
    default:
        break;
    }
    out->version = code;
    if (code >> 16 != PG_VERSION_3_0 >> 16) {
        out->kind = PG_OTHER_VERSION;
        return PG_OK;
    }
    out->kind = PG_STARTUP;
    return read_parameters((struct str){p + 8, (uint32_t)(out->size - 8)}, out) ? PG_OK : PG_BAD;
}

enum pg_read pg_read_message(const char *p, size_t n, size_t most, struct pg_message *out)
{
    if (n < 5)
        return PG_MORE;
    uint32_t length = number_at(p + 1);
    if (length < 4 || length > most)
        return PG_BAD;
    if (n - 1 < length)
        return PG_MORE;
    out->type = p[0];
    out->size = (size_t)length + 1;
    out->body = (struct str){p + 5, length - 4};
    return PG_OK;
}

bool pg_read_authentication(struct str body, uint32_t *kind, struct str *rest)
{
    if (body.n < 4)
        return false;
    *kind = number_at(body.p);
    *rest = (struct str){body.p + 4, body.n - 4};
    return true;
}

bool pg_offers(struct str mechanisms, const char *name)
{
    struct str each;
    bool found = false;
    while (take_text(&mechanisms, &each) && each.n)
        found |= str_is(each, name);
    return found && !mechanisms.n;
}

bool pg_read_sasl_initial(struct str body, struct str *mechanism, struct str *data)
{
    if (!take_text(&body, mechanism) || body.n < 4 || number_at(body.p) != body.n - 4)
        return false;
    *data = (struct str){body.p + 4, body.n - 4};
    return true;
}

struct str pg_error_field(struct str body, char field)
{
    struct str text;
    while (take_text(&body, &text) && text.n)
        if (text.p[0] == field)
            return (struct str){text.p + 1, text.n - 1};
    return (struct str){"", 0};
}

bool pg_read_key(struct str body, uint32_t *process, uint32_t *secret)
{
    if (body.n != 8)
        return false;
    *process = number_at(body.p);
    *secret = number_at(body.p + 4);
    return true;
}

static void out_u32(struct out *o, uint32_t v)
{
    out_add(o, (const char[]){(char)(v >> 24), (char)(v >> 16), (char)(v >> 8), (char)v}, 4);
}

static void out_str(struct out *o, struct str s)
{
    out_add(o, s.p, s.n);
    out_add(o, "", 1);
}

/* The length of what was written from `start` on, into the four bytes kept free for it there. */
static void set_length(struct out *o, size_t start)
{
    uint32_t n = (uint32_t)(o->n - start);
    if (!o->over)
        memcpy(o->p + start, (const char[]){(char)(n >> 24), (char)(n >> 16), (char)(n >> 8), (char)n}, 4);
}

void pg_write_request(struct out *o, uint32_t code)
{
    out_u32(o, 8);
    out_u32(o, code);
}

void pg_write_cancel(struct out *o, uint32_t process, uint32_t secret)
{
    out_u32(o, 16);
    out_u32(o, PG_CANCEL_REQUEST);
    out_u32(o, process);
    out_u32(o, secret);
}

void pg_write_startup(struct out *o, const struct pg_startup *s)
{
    size_t start = o->n;
    out_u32(o, 0);
    out_u32(o, PG_VERSION_3_0);
    out_str(o, str_of("user"));
    out_str(o, s->user);
    out_str(o, str_of("database"));
    out_str(o, s->database);
    for (unsigned i = 0; i < s->n; i++) {
        out_str(o, s->name[i]);
        out_str(o, s->value[i]);
    }
    out_add(o, "", 1);
    set_length(o, start);
}

void pg_write_negotiation(struct out *o, const struct pg_startup *s)
{
    out_add(o, "v", 1);
    size_t start = o->n;
    out_u32(o, 0);
    out_u32(o, PG_VERSION_3_0);
    out_u32(o, s->options);
    for (unsigned i = 0; i < s->options; i++)
        out_str(o, s->option[i]);
    set_length(o, start);
}

void pg_write(struct out *o, char type, struct str body)
{
    out_add(o, &type, 1);
    out_u32(o, body.n + 4);
    out_add(o, body.p, body.n);
}

void pg_write_authentication(struct out *o, uint32_t kind, struct str rest)
{
    out_add(o, "R", 1);
    out_u32(o, rest.n + 8);
    out_u32(o, kind);
    out_add(o, rest.p, rest.n);
}

void pg_write_sasl_initial(struct out *o, const char *mechanism, struct str data)
{
    out_add(o, "p", 1);
    size_t start = o->n;
    out_u32(o, 0);
    out_str(o, str_of(mechanism));
    out_u32(o, data.n);
    out_add(o, data.p, data.n);
    set_length(o, start);
}

static void out_error_field(struct out *o, char field, const char *text)
{
    if (!text || !*text)
        return;
    out_add(o, &field, 1);
    out_str(o, str_of(text));
}

void pg_write_error(struct out *o, const char *sqlstate, const char *message, const char *detail, const char *hint)
{
    out_add(o, "E", 1);
    size_t start = o->n;
    out_u32(o, 0);
    out_error_field(o, 'S', "FATAL");
    out_error_field(o, 'V', "FATAL");
    out_error_field(o, 'C', sqlstate);
    out_error_field(o, 'M', message);
    out_error_field(o, 'D', detail);
    out_error_field(o, 'H', hint);
    out_add(o, "", 1);
    set_length(o, start);
}
