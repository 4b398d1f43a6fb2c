/* See mywire.h. */
#include "mywire.h"

#include <string.h>

/* Bytes that are left to read; what is not there makes it bad, and reads as zero. */
struct rest {
    const char *p;
    size_t n;
    bool bad;
};

static struct str take(struct rest *r, size_t n)
{
    if (r->bad || r->n < n) {
        r->bad = true;
        return (struct str){"", 0};
    }
    struct str s = {r->p, (uint32_t)n};
    r->p += n;
    r->n -= n;
    return s;
}

static uint32_t take_number(struct rest *r, unsigned bytes)
{
    struct str s = take(r, bytes);
    uint32_t v = 0;
    for (uint32_t i = 0; i < s.n; i++)
        v |= (uint32_t)(unsigned char)s.p[i] << (8 * i);
    return v;
}

/* Up to a zero byte, which is taken too. */
static struct str take_text(struct rest *r)
{
    const char *end = r->bad || !r->n ? NULL : memchr(r->p, 0, r->n);
    if (!end) {
        r->bad = true;
        return (struct str){"", 0};
    }
    struct str s = take(r, (size_t)(end - r->p));
    (void)take(r, 1);
    return s;
}

/* A length-encoded text. Lengths of eight bytes are longer than any packet here. */
static struct str take_counted(struct rest *r)
{
    uint32_t n = take_number(r, 1);
    if (n > 0xfa)
        n = n == 0xfc ? take_number(r, 2) : n == 0xfd ? take_number(r, 3) : UINT32_MAX;
    return take(r, n);
}

enum my_read my_read_packet(const char *p, size_t n, size_t most, struct my_packet *out)
{
    struct rest r = {p, n, false};
    if (n < MY_HEADER)
        return MY_MORE;
    size_t size = take_number(&r, 3);
    if (size > most)
        return MY_BAD;
    out->sequence = (uint8_t)take_number(&r, 1);
    if (r.n < size)
        return MY_MORE;
    out->size = size + MY_HEADER;
    out->body = take(&r, size);
    return MY_OK;
}

static bool is_visible(struct str s)
{
    for (uint32_t i = 0; i < s.n; i++)
        if (s.p[i] < 0x20 || s.p[i] > 0x7e)
            return false;
    return true;
}

bool my_read_greeting(struct str body, struct my_greeting *out)
{
    struct rest r = {body.p, body.n, false};
    memset(out, 0, sizeof *out);
    if (take_number(&r, 1) != 10)
        return false;
    out->version = take_text(&r);
    out->thread = take_number(&r, 4);
    struct str first = take(&r, 8);
    (void)take(&r, 1);
    out->capabilities = take_number(&r, 2);
    out->charset = (uint8_t)take_number(&r, 1);
    out->status = (uint16_t)take_number(&r, 2);
    out->capabilities |= take_number(&r, 2) << 16;
    uint32_t length = take_number(&r, 1);
    (void)take(&r, 6);
    out->further = take_number(&r, 4);
    if (out->capabilities & MY_LONG_PASSWORD)
        out->further = 0; /* reserved */
    struct str second = take(&r, length > 8 + 13 ? length - 8 : 13);
    if (!(out->capabilities & MY_PLUGINS))
        out->plugin = (struct str){"", 0};
    else if (!r.bad && r.n && !memchr(r.p, 0, r.n)) /* old servers forget the zero byte */
        out->plugin = take(&r, r.n);
    else
        out->plugin = take_text(&r);
    bool good = !r.bad && !r.n && out->version.n && out->version.n < MY_VERSION_MAX && is_visible(out->version)
        && out->plugin.n < MY_PLUGIN_MAX && is_visible(out->plugin)
        && (~out->capabilities & (MY_PROTOCOL_41 | MY_SECURE)) == 0;
    if (good) {
        memcpy(out->scramble, first.p, 8);
        memcpy(out->scramble + 8, second.p, MY_SCRAMBLE - 8);
    }
    return good;
}

static bool are_pairs(struct str s)
{
    struct rest r = {s.p, s.n, false};
    while (!r.bad && r.n) {
        (void)take_counted(&r);
        (void)take_counted(&r);
    }
    return !r.bad;
}

bool my_read_login(struct str body, struct my_login *out)
{
    struct rest r = {body.p, body.n, false};
    memset(out, 0, sizeof *out);
    out->user = out->answer = out->database = out->plugin = out->attributes = (struct str){"", 0};
    out->capabilities = take_number(&r, 4);
    out->packet_max = take_number(&r, 4);
    out->charset = (uint8_t)take_number(&r, 1);
    (void)take(&r, 19);
    out->further = take_number(&r, 4);
    if (out->capabilities & MY_LONG_PASSWORD)
        out->further = 0;
    if (r.bad || !(out->capabilities & MY_PROTOCOL_41))
        return false;
    out->wants_tls = !r.n;
    if (out->wants_tls)
        return (out->capabilities & MY_SSL) != 0;
    out->user = take_text(&r);
    if (out->capabilities & MY_LONG_ANSWER)
        out->answer = take_counted(&r);
    else if (out->capabilities & MY_SECURE)
        out->answer = take(&r, take_number(&r, 1));
    else
        return false; /* passwords of MySQL 4.0 */
    if (out->capabilities & MY_WITH_DATABASE)
        out->database = take_text(&r);
    if (out->capabilities & MY_PLUGINS)
        out->plugin = take_text(&r);
    if (out->capabilities & MY_ATTRIBUTES)
        out->attributes = take_counted(&r);
    return !r.bad && !r.n && out->user.n < MY_NAME_MAX && out->plugin.n < MY_PLUGIN_MAX && are_pairs(out->attributes);
}

int my_kind(struct str body)
{
    int kind = body.n ? (unsigned char)body.p[0] : -1;
    return kind == MY_KIND_OK || kind == MY_KIND_MORE || kind == MY_KIND_SWITCH || kind == MY_KIND_ERROR ? kind : -1;
}

bool my_read_switch(struct str body, struct str *plugin, struct str *data)
{
    struct rest r = {body.p, body.n, false};
    bool kind = take_number(&r, 1) == MY_KIND_SWITCH;
    *plugin = take_text(&r);
    *data = take(&r, r.n);
    if (data->n && !data->p[data->n - 1])
        data->n--;
    return kind && !r.bad && plugin->n && plugin->n < MY_PLUGIN_MAX && is_visible(*plugin);
}

bool my_read_error(struct str body, unsigned *code, struct str *state)
{
    struct rest r = {body.p, body.n, false};
    bool kind = take_number(&r, 1) == MY_KIND_ERROR;
    *code = take_number(&r, 2);
    *state = (struct str){"", 0};
    if (!r.bad && r.n && *r.p == '#') {
        (void)take(&r, 1);
        *state = take(&r, 5);
    }
    return kind && !r.bad;
}

static void out_number_of(struct out *o, uint32_t v, unsigned bytes)
{
    for (unsigned i = 0; i < bytes; i++)
        out_add(o, (const char[]){(char)(v >> (8 * i))}, 1);
}

static void out_zeros(struct out *o, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        out_add(o, "", 1);
}

static void out_str(struct out *o, struct str s)
{
    out_add(o, s.p, s.n);
    out_add(o, "", 1);
}

static size_t begin(struct out *o, uint8_t sequence)
{
    size_t start = o->n;
    out_number_of(o, 0, 3);
    out_number_of(o, sequence, 1);
    return start;
}

static void end(struct out *o, size_t start)
{
    size_t n = o->n - start - MY_HEADER;
    if (!o->over)
        memcpy(o->p + start, (const char[]){(char)n, (char)(n >> 8), (char)(n >> 16)}, 3);
}

void my_write(struct out *o, uint8_t sequence, struct str body)
{
    size_t start = begin(o, sequence);
    out_add(o, body.p, body.n);
    end(o, start);
}

void my_write_greeting(struct out *o, const struct my_greeting *g)
{
    size_t start = begin(o, 0);
    out_number_of(o, 10, 1);
    out_str(o, g->version);
    out_number_of(o, g->thread, 4);
    out_add(o, g->scramble, 8);
    out_zeros(o, 1);
    out_number_of(o, g->capabilities, 2);
    out_number_of(o, g->charset, 1);
    out_number_of(o, g->status, 2);
    out_number_of(o, g->capabilities >> 16, 2);
    out_number_of(o, MY_SCRAMBLE + 1, 1);
    out_zeros(o, 6);
    out_number_of(o, g->further, 4);
    out_add(o, g->scramble + 8, MY_SCRAMBLE - 8);
    out_zeros(o, 1);
    if (g->capabilities & MY_PLUGINS)
        out_str(o, g->plugin);
    end(o, start);
}

static void out_counted(struct out *o, struct str s)
{
    if (s.n <= 0xfa) {
        out_number_of(o, s.n, 1);
    } else {
        out_number_of(o, s.n <= 0xffff ? 0xfc : 0xfd, 1);
        out_number_of(o, s.n, s.n <= 0xffff ? 2 : 3);
    }
    out_add(o, s.p, s.n);
}

void my_write_login(struct out *o, uint8_t sequence, const struct my_login *l)
{
    size_t start = begin(o, sequence);
    out_number_of(o, l->capabilities, 4);
    out_number_of(o, l->packet_max, 4);
    out_number_of(o, l->charset, 1);
    out_zeros(o, 19);
    out_number_of(o, l->further, 4);
    if (!l->wants_tls) {
        out_str(o, l->user);
        out_number_of(o, l->answer.n, 1);
        out_add(o, l->answer.p, l->answer.n);
        if (l->capabilities & MY_WITH_DATABASE)
            out_str(o, l->database);
        if (l->capabilities & MY_PLUGINS)
            out_str(o, l->plugin);
        if (l->capabilities & MY_ATTRIBUTES)
            out_counted(o, l->attributes);
    }
    end(o, start);
}

void my_write_switch(struct out *o, uint8_t sequence, const char *plugin, const char scramble[MY_SCRAMBLE])
{
    size_t start = begin(o, sequence);
    out_number_of(o, MY_KIND_SWITCH, 1);
    out_str(o, str_of(plugin));
    out_add(o, scramble, MY_SCRAMBLE);
    out_zeros(o, 1);
    end(o, start);
}

void my_write_error(struct out *o, uint8_t sequence, unsigned code, const char *state, const char *message)
{
    size_t start = begin(o, sequence);
    out_number_of(o, MY_KIND_ERROR, 1);
    out_number_of(o, code, 2);
    if (state) {
        out_add(o, "#", 1);
        out_add(o, state, 5);
    }
    out_text(o, message);
    end(o, start);
}
