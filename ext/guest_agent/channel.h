/* The one byte stream to the host, and the frames that are queued for it.
 *
 *   PORT   a virtio-serial port: always open; reads 0 while no host listens
 *   VSOCK  a connection that we make to the host, and make again when it ends
 *   TEST   a given socket; the program ends when it is closed
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
    bool broken;  /* VSOCK: poll reported an error or a hang-up */
    bool greeted; /* frames may be sent */
    bool ended;   /* TEST: the other side has closed */
    bool no_agent;
    int64_t retry_at;
    int64_t closed_at; /* PORT: since when it reads as closed though the host had greeted; 0: it does not */
    uint8_t nonce[NONCE_BYTES];
    struct frame_reader in;
    uint8_t out[CHANNEL_OUT_BYTES];
    size_t out_begin, out_end;
};

/* Finds the port, else prepares vsock; `fd` >= 0 is the TEST kind. */
void channel_open(struct channel *channel, int fd);
/* Milliseconds until channel_step is due without an event; -1: never. */
int channel_timeout(const struct channel *channel);
/* Records what poll reported for `edge`, and (re)connects. */
void channel_step(struct channel *channel);
/* Reads once; false if there was nothing to read. */
bool channel_read(struct channel *channel);
/* The host has greeted: drops old output, answers. */
void channel_greet(struct channel *channel);
void channel_flush(struct channel *channel);

/* Where a frame with up to `length` payload bytes may be built (payload at + HEADER_BYTES); NULL: no room at present.
 * */
uint8_t *channel_room(struct channel *channel, size_t length);
/* Queues the frame that was built where channel_room returned. */
void channel_send(struct channel *channel, uint8_t type, uint8_t flags, uint32_t session, size_t length);
static inline bool channel_drained(const struct channel *channel)
{
    return channel->out_begin == channel->out_end;
}

#endif
