/* Bytes of the channel to frames: finds the greeting, then takes one frame after the other.
 *
 * Pure: no descriptors, no allocation. Input is one fixed buffer that holds at least one whole frame, so
 * a caller can always read more. Anything that is no frame of this connection makes the reader look for a greeting
 * again; the caller then ends what ran for the old connection.
 */
#ifndef HM_FRAME_H
#define HM_FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "protocol.h"

struct frame {
    uint8_t type, flags;
    uint16_t length;
    uint32_t session;
    const uint8_t *payload; /* valid until the next call */
};

enum frame_result {
    FRAME_NONE,    /* more bytes are needed */
    FRAME_READY,   /* *frame holds one */
    FRAME_GREETED, /* a host greeted: answer it, forget all sessions */
    FRAME_LOST     /* garbage: forget all sessions; the reader looks for a greeting */
};

struct frame_reader {
    uint8_t buffer[2 * FLUSH_BYTES];
    size_t begin, end;
    bool synced;
    uint8_t token[TOKEN_BYTES];
};

/* Where to read into, and how much; never zero after next_frame returned FRAME_NONE. */
uint8_t *frame_space(struct frame_reader *reader, size_t *room);
void frame_filled(struct frame_reader *reader, size_t length);
enum frame_result next_frame(struct frame_reader *reader, struct frame *frame);
void frame_reset(struct frame_reader *reader);

/* Writes header and trailer around `length` payload bytes that stand (or will stand) at at + HEADER_BYTES. */
void seal_frame(uint8_t *at, const uint8_t *token, uint8_t type, uint8_t flags, uint32_t session, size_t length);
/* The answer to a greeting: ACK_BYTES at `at`. */
void render_ack(uint8_t *at, const uint8_t *token, const uint8_t *nonce, uint16_t flags);

#endif
