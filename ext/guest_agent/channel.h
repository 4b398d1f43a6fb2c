/* The one byte stream to the host, and the frames that wait to be written to it.
 *
 *   PORT   a virtio-serial port: always open; reads 0 while no host listens
 *   VSOCK  a connection to the host that we make, and make again when it ends
 *   TEST   a given socket whose end is the end of the program
 *
 * Output is one fixed ring of whole frames: a sender asks for room first and keeps its state
 * until there is some, so nothing is ever dropped or allocated.
 */
#ifndef HM_CHANNEL_H
#define HM_CHANNEL_H

#include <stdbool.h>
#include <stdint.h>

#include "frame.h"

enum channel_kind { CHANNEL_PORT, CHANNEL_VSOCK, CHANNEL_TEST };

#define CHANNEL_OUT_BYTES (8 * FLUSH_BYTES)

struct channel {
    enum channel_kind kind;
    int fd;   /* -1: not connected */
    int edge; /* epoll of fd, edge-triggered: a port without a host is always "hung up", which must not spin us */
    bool readable, writable;
    bool broken;  /* VSOCK: poll told of an error or a hang-up */
    bool greeted; /* frames may be sent */
    bool ended;   /* TEST: the other side has gone */
    bool no_agent;
    int64_t retry_at;
    int64_t closed_at; /* PORT: since when it reads as closed though the host had greeted; 0: it does not */
    uint8_t nonce[NONCE_BYTES];
    struct frame_reader in;
    uint8_t out[CHANNEL_OUT_BYTES];
    size_t out_begin, out_end;
};

/* Finds the port, else readies vsock; `fd` >= 0 is the TEST kind. */
void channel_open(struct channel *channel, int fd);
/* Milliseconds until the channel wants to be stepped again by itself; -1 never. */
int channel_timeout(const struct channel *channel);
/* Notes what poll said about `edge`, and (re)connects. */
void channel_step(struct channel *channel);
/* Reads once if there is something. False if there was nothing. */
bool channel_read(struct channel *channel);
/* The host has greeted: drops old output, answers. */
void channel_greet(struct channel *channel);
void channel_flush(struct channel *channel);

/* Where a frame with up to `length` payload bytes may be built (payload at + HEADER_BYTES), or NULL for now. */
uint8_t *channel_room(struct channel *channel, size_t length);
/* Sends the frame that stands where channel_room said. */
void channel_send(struct channel *channel, uint8_t type, uint8_t flags, uint32_t session, size_t length);
static inline bool channel_drained(const struct channel *channel)
{
    return channel->out_begin == channel->out_end;
}

#endif
