/* See llhttp_opinion.h. */
#include "llhttp_opinion.h"

#include <llhttp.h>

static int on_field(llhttp_t *l)
{
    ((struct opinion *)l->data)->fields++;
    return 0;
}

static int on_head(llhttp_t *l)
{
    struct opinion *o = l->data;
    o->head = true;
    o->chunked = l->flags & F_CHUNKED;
    o->length = l->flags & F_CONTENT_LENGTH;
    return 0;
}

static int on_body(llhttp_t *l, const char *p, size_t n)
{
    struct opinion *o = l->data;
    for (size_t i = 0; i < n; i++)
        o->sum = o->sum * 33 + (unsigned char)p[i];
    return 0;
}

static int on_message(llhttp_t *l)
{
    ((struct opinion *)l->data)->message = true;
    return 0;
}

struct opinion llhttp_opinion(bool response, const char *a, size_t n, const char *b, size_t m)
{
    struct opinion o = {.sum = 5381};
    llhttp_settings_t settings;
    llhttp_t l;
    llhttp_settings_init(&settings);
    settings.on_header_value_complete = on_field;
    settings.on_headers_complete = on_head;
    settings.on_body = on_body;
    settings.on_message_complete = on_message;
    llhttp_init(&l, response ? HTTP_RESPONSE : HTTP_REQUEST, &settings);
    l.data = &o;
    enum llhttp_errno e = llhttp_execute(&l, a, n);
    if (e == HPE_OK && m)
        e = llhttp_execute(&l, b, m);
    o.unknown = e == HPE_INVALID_METHOD || e == HPE_PAUSED_H2_UPGRADE;
    o.odd_target = e == HPE_INVALID_URL;
    o.refused = e != HPE_OK && e != HPE_PAUSED_UPGRADE;
    o.major = l.http_major;
    o.minor = l.http_minor;
    o.status = l.status_code;
    o.method = response || o.refused ? "" : llhttp_method_name(l.method);
    return o;
}
