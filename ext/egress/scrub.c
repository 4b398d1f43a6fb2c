/* See scrub.h. */
#include "scrub.h"

#include <string.h>
#include <strings.h>

void needles_add(struct needles *s, struct str text, struct str replacement)
{
    unsigned at = s->n;
    if (!text.n || s->n == SCRUB_MAX)
        return;
    for (unsigned i = 0; i < s->n; i++)
        if (s->needle[i].text.n == text.n && memcmp(s->needle[i].text.p, text.p, text.n) == 0)
            return;
    for (; at && s->needle[at - 1].text.n < text.n; at--)
        s->needle[at] = s->needle[at - 1];
    s->needle[at] = (struct needle){text, replacement};
    s->n++;
    s->first[(unsigned char)text.p[0]] = true;
    for (unsigned second = 0; second < 256; second++)
        if (text.n == 1 || second == (unsigned char)text.p[1])
            s->pairs[(unsigned char)text.p[0]][second / 8] |= (uint8_t)(1 << second % 8);
}

/* Whether a text may be here: by the first two bytes, so that few places need a comparison. */
static bool may_be_here(const struct needles *s, const char *p, size_t n)
{
    unsigned char first = (unsigned char)p[0], second = n > 1 ? (unsigned char)p[1] : 0;
    return n > 1 ? s->pairs[first][second / 8] >> second % 8 & 1 : s->first[first];
}

enum found { FOUND_NONE, FOUND_MAYBE, FOUND };

static enum found find_here(const struct needles *s, const char *p, size_t n, bool last, const struct needle **found)
{
    for (unsigned i = 0; i < s->n; i++) {
        struct str text = s->needle[i].text;
        bool whole = n >= text.n;
        if ((!whole && last) || memcmp(p, text.p, whole ? text.n : n) != 0)
            continue;
        *found = &s->needle[i];
        return whole ? FOUND : FOUND_MAYBE;
    }
    return FOUND_NONE;
}

size_t scrub_next(const struct needles *s, const char *p, size_t n, bool last, struct str *out)
{
    const struct needle *found = NULL;
    enum found how = FOUND_NONE;
    size_t at = 0;
    for (; at < n; at++)
        if (may_be_here(s, p + at, n - at) && (how = find_here(s, p + at, n - at, last, &found)) != FOUND_NONE)
            break;
    if (at || how != FOUND) {
        *out = (struct str){p, (uint32_t)at};
        return at;
    }
    *out = found->replacement;
    return found->text.n;
}

bool scrub_finds(const struct needles *s, struct str in)
{
    for (unsigned i = 0; i < s->n; i++) {
        struct str text = s->needle[i].text;
        for (uint32_t at = 0; at + text.n <= in.n; at++)
            if (strncasecmp(in.p + at, text.p, text.n) == 0)
                return true;
    }
    return false;
}
