#include "frame.h"

#include <string.h>

#include "bytes.h"

uint8_t *frame_space(struct frame_reader *reader, size_t *room)
{
    if (reader->begin > 0 && reader->end > sizeof reader->buffer / 2) {
        memmove(reader->buffer, reader->buffer + reader->begin, reader->end - reader->begin);
        reader->end -= reader->begin;
        reader->begin = 0;
    }
    *room = sizeof reader->buffer - reader->end;
    return reader->buffer + reader->end;
}

void frame_filled(struct frame_reader *reader, size_t length)
{
    reader->end += length;
}

void frame_reset(struct frame_reader *reader)
{
    reader->begin = reader->end = 0;
    reader->synced = false;
}

/* Looks for a greeting; drops what cannot be the beginning of one. */
static enum frame_result find_greeting(struct frame_reader *reader)
{
    while (reader->begin < reader->end) {
        uint8_t *at = reader->buffer + reader->begin;
        size_t left = reader->end - reader->begin;
        uint8_t *first = memchr(at, SYNC_MAGIC[0], left);
        if (!first) {
            reader->begin = reader->end = 0;
            return FRAME_NONE;
        }
        reader->begin += (size_t)(first - at);
        left -= (size_t)(first - at);
        if (memcmp(first, SYNC_MAGIC, left < MAGIC_BYTES ? left : MAGIC_BYTES) != 0) {
            reader->begin++;
            continue;
        }
        if (left < SYNC_BYTES)
            return FRAME_NONE;
        if (crc32_of(first, MAGIC_BYTES + TOKEN_BYTES) != get_u32(first + MAGIC_BYTES + TOKEN_BYTES)) {
            reader->begin++;
            continue;
        }
        memcpy(reader->token, first + MAGIC_BYTES, TOKEN_BYTES);
        reader->begin += SYNC_BYTES;
        reader->synced = true;
        return FRAME_GREETED;
    }
    return FRAME_NONE;
}

static enum frame_result lose_sync(struct frame_reader *reader)
{
    reader->synced = false;
    return FRAME_LOST;
}

enum frame_result next_frame(struct frame_reader *reader, struct frame *frame)
{
    if (!reader->synced)
        return find_greeting(reader);
    const uint8_t *at = reader->buffer + reader->begin;
    size_t left = reader->end - reader->begin;
    if (left == 0)
        return FRAME_NONE;
    if (memcmp(at, reader->token, left < 4 ? left : 4) != 0)
        return lose_sync(reader);
    if (left < HEADER_BYTES)
        return FRAME_NONE;
    frame->type = at[4];
    frame->flags = at[5];
    frame->length = get_u16(at + 6);
    frame->session = get_u32(at + 8);
    frame->payload = at + HEADER_BYTES;
    if (frame->length > MAX_PAYLOAD)
        return lose_sync(reader);
    size_t whole = HEADER_BYTES + frame->length + TRAILER_BYTES;
    if (left < whole)
        return FRAME_NONE;
    /* The cut frame of an earlier connection is dropped from its second byte on: a greeting may hide in it. */
    if (memcmp(at + HEADER_BYTES + frame->length, reader->token + 4, TRAILER_BYTES) != 0) {
        reader->begin++;
        return lose_sync(reader);
    }
    reader->begin += whole;
    return FRAME_READY;
}

void seal_frame(uint8_t *at, const uint8_t *token, uint8_t type, uint8_t flags, uint32_t session, size_t length)
{
    memcpy(at, token, 4);
    at[4] = type;
    at[5] = flags;
    put_u16(at + 6, (uint16_t)length);
    put_u32(at + 8, session);
    memcpy(at + HEADER_BYTES + length, token + 4, TRAILER_BYTES);
}

void render_ack(uint8_t *at, const uint8_t *token, const uint8_t *nonce, uint16_t flags)
{
    uint8_t *p = at;
    memcpy(p, ACK_MAGIC, MAGIC_BYTES);
    memcpy(p += MAGIC_BYTES, token, TOKEN_BYTES);
    memcpy(p += TOKEN_BYTES, nonce, NONCE_BYTES);
    put_u16(p += NONCE_BYTES, PROTOCOL_VERSION);
    put_u16(p += 2, flags);
    put_u32(p + 2, crc32_of(at, ACK_BYTES - 4));
}
