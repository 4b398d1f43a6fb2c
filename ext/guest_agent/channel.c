#define _GNU_SOURCE
#include "channel.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#include "port.h"
#include "util.h"

#define RETRY_MS 100
/* The port's edges report host and data; this check is for one that is lost, as after a restore. */
#define PORT_CHECK_MS 1000
/* That a host connects is reported on another queue than its bytes, and may arrive later: until then the port reads as
 * closed. So it counts as closed only after this time. */
#define PORT_CLOSED_MS 50

static void attach(struct channel *channel, int fd)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET};
    channel->fd = fd;
    channel->broken = false;
    set_nonblocking(fd);
    epoll_ctl(channel->edge, EPOLL_CTL_ADD, fd, &event);
    channel->readable = channel->writable = true;
}

static void forget_connection(struct channel *channel)
{
    channel->greeted = false;
    channel->closed_at = 0;
    channel->out_begin = channel->out_end = 0;
    frame_reset(&channel->in);
}

void channel_open(struct channel *channel, int fd)
{
    channel->edge = epoll_create1(EPOLL_CLOEXEC);
    channel->fd = -1;
    channel->kind = fd >= 0 ? CHANNEL_TEST : CHANNEL_PORT;
    if (fd < 0)
        fd = open_port(AGENT_PORT_NAME, O_RDWR);
    if (fd >= 0)
        attach(channel, fd);
    else
        channel->kind = CHANNEL_VSOCK;
}

/* Non-blocking: connecting takes long if there is no host. */
static void connect_vsock(struct channel *channel)
{
    struct sockaddr_vm host = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = AGENT_VSOCK_PORT};
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    channel->retry_at = now_ms() + RETRY_MS;
    if (fd < 0)
        return;
    if (connect(fd, (struct sockaddr *)&host, sizeof host) < 0 && errno != EINPROGRESS) {
        close(fd);
        return;
    }
    attach(channel, fd);
}

static void disconnected(struct channel *channel)
{
    forget_connection(channel);
    channel->readable = false;
    if (channel->kind == CHANNEL_TEST)
        channel->ended = true;
    if (channel->kind == CHANNEL_VSOCK) {
        close_fd(&channel->fd);
        channel->retry_at = now_ms() + RETRY_MS;
    }
}

int channel_timeout(const struct channel *channel)
{
    if (channel->kind == CHANNEL_VSOCK && channel->fd < 0) {
        int64_t wait = channel->retry_at - now_ms();
        return wait > 0 ? (int)wait : 0;
    }
    if (channel->kind != CHANNEL_PORT)
        return -1;
    return channel->closed_at ? PORT_CLOSED_MS : PORT_CHECK_MS;
}

void channel_step(struct channel *channel)
{
    struct epoll_event event;
    while (epoll_wait(channel->edge, &event, 1, 0) == 1) {
        channel->readable = true;
        channel->writable = true;
        channel->broken |= (event.events & (EPOLLERR | EPOLLHUP)) != 0;
        if (channel->kind == CHANNEL_PORT)
            break;
    }
    if (channel->kind == CHANNEL_VSOCK && channel->fd < 0 && now_ms() >= channel->retry_at)
        connect_vsock(channel);
    if (channel->kind == CHANNEL_PORT)
        channel->readable = true;
}

static bool stays_closed(struct channel *channel)
{
    if (channel->kind != CHANNEL_PORT || !channel->greeted)
        return true;
    if (!channel->closed_at)
        channel->closed_at = now_ms();
    return now_ms() - channel->closed_at >= PORT_CLOSED_MS;
}

bool channel_read(struct channel *channel)
{
    size_t room;
    uint8_t *space = frame_space(&channel->in, &room);
    if (!channel->readable || channel->fd < 0)
        return false;
    ssize_t n = read(channel->fd, space, room);
    if (n > 0) {
        channel->closed_at = 0;
        frame_filled(&channel->in, (size_t)n);
        return true;
    }
    if (n < 0 && errno == EINTR)
        return true;
    channel->readable = false;
    if (n == 0 && !stays_closed(channel))
        return false;
    channel->closed_at = 0;
    /* ENOTCONN: a vsock that is still connecting, unless it has failed. */
    if (n == 0 || (errno != EAGAIN && (errno != ENOTCONN || channel->broken)))
        disconnected(channel);
    return false;
}

void channel_greet(struct channel *channel)
{
    channel->out_begin = 0;
    channel->out_end = ACK_BYTES;
    render_ack(channel->out, channel->in.token, channel->nonce,
               ACK_FLAG_KEEPS | (channel->no_agent ? ACK_FLAG_NO_AGENT : 0));
    channel->greeted = true;
    channel->writable = true;
}

void channel_flush(struct channel *channel)
{
    while (channel->fd >= 0 && channel->writable && channel->out_begin < channel->out_end) {
        ssize_t n = write(channel->fd, channel->out + channel->out_begin, channel->out_end - channel->out_begin);
        if (n > 0) {
            channel->out_begin += (size_t)n;
        } else if (n < 0 && errno == EAGAIN) {
            channel->writable = false;
        } else if (n == 0 || errno != EINTR) {
            disconnected(channel);
            return;
        }
    }
    if (channel->out_begin == channel->out_end)
        channel->out_begin = channel->out_end = 0;
}

uint8_t *channel_room(struct channel *channel, size_t length)
{
    size_t whole = HEADER_BYTES + length + TRAILER_BYTES;
    if (!channel->greeted)
        return NULL;
    if (sizeof channel->out - channel->out_end < whole && channel->out_begin >= sizeof channel->out / 2) {
        memmove(channel->out, channel->out + channel->out_begin, channel->out_end - channel->out_begin);
        channel->out_end -= channel->out_begin;
        channel->out_begin = 0;
    }
    return sizeof channel->out - channel->out_end < whole ? NULL : channel->out + channel->out_end;
}

void channel_send(struct channel *channel, uint8_t type, uint8_t flags, uint32_t session, size_t length)
{
    seal_frame(channel->out + channel->out_end, channel->in.token, type, flags, session, length);
    channel->out_end += HEADER_BYTES + length + TRAILER_BYTES;
}
