#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "channel.h"
#include "events.h"
#include "freezer.h"
#include "machine.h"
#include "request.h"
#include "session.h"
#include "util.h"
#include "workload.h"

#define READS_PER_ROUND 32
/* A frozen guest is being captured; after its restore the port's edge for the new host may be lost, so it is polled. */
#define FROZEN_CHECK_MS 5

static struct channel channel;

static int open_signals(void)
{
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    return signalfd(-1, &all, SFD_CLOEXEC | SFD_NONBLOCK);
}

/* Signals that somebody in the guest sends to process 1 are meant for the main process. */
static void take_signals(int fd)
{
    struct signalfd_siginfo info;
    while (read(fd, &info, sizeof info) == (ssize_t)sizeof info)
        if (info.ssi_signo != SIGCHLD && info.ssi_signo != SIGPIPE)
            workload_signal((int)info.ssi_signo);
}

/* As process 1 we also reap what others left behind. */
static void reap_children(void)
{
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        session_reap(pid, status); /* which may have been the instance's own program as well */
        workload_reap(pid, status);
    }
}

static void take_frames(const struct boot_config *config)
{
    struct frame frame;
    for (;;) {
        switch (next_frame(&channel.in, &frame)) {
        case FRAME_NONE:
            return;
        case FRAME_GREETED:
            sessions_lost();
            events_resend();
            channel_greet(&channel);
            break;
        case FRAME_LOST:
            sessions_lost();
            channel.greeted = false;
            break;
        case FRAME_READY:
            if (!handle_frame(config, &channel, &frame)) {
                sessions_lost();
                channel.greeted = channel.in.synced = false;
            }
        }
    }
}

/* A virtio-serial port returns 4 KB at a time, so a round reads several times. Requests may need room for answers:
 * without any, they wait. */
static void take_input(const struct boot_config *config)
{
    for (int i = 0; i < READS_PER_ROUND && (!channel.greeted || channel_room(&channel, 4 * MAX_PAYLOAD)); i++) {
        bool was_greeted = channel.greeted;
        if (channel_read(&channel))
            take_frames(config);
        else if (was_greeted && !channel.greeted)
            sessions_lost();
        if (!channel.readable)
            return;
    }
}

static int sooner(int a, int b)
{
    return a < 0 ? b : b < 0 || a < b ? a : b;
}

void agent_run(const struct boot_config *config, int fd)
{
    static struct pollfd fds[2 + WORKLOAD_POLL_FDS + SESSION_POLL_FDS];
    int signals = open_signals();
    memcpy(channel.nonce, config->nonce, NONCE_BYTES);
    channel.no_agent = config->skip_agent;
    channel_open(&channel, fd);
    while (!channel.ended && !machine_over()) {
        bool was_greeted = channel.greeted;
        reap_children();
        sessions_step(&channel);
        events_step(&channel);
        channel_flush(&channel);
        if (was_greeted && !channel.greeted)
            sessions_lost();

        int thaw_in = freezer_step();
        bool frozen = thaw_in >= 0;
        int timeout = sooner(sooner(sooner(workload_step(), machine_step(&channel)), sessions_timeout(&channel)),
                             sooner(channel_timeout(&channel), thaw_in));
        if (frozen)
            timeout = sooner(timeout, FROZEN_CHECK_MS);
        if (channel.readable && channel_room(&channel, 4 * MAX_PAYLOAD))
            timeout = 0;
        fds[0] = (struct pollfd){signals, POLLIN, 0};
        fds[1] = (struct pollfd){channel.edge, POLLIN, 0};
        size_t workload_end = workload_poll(fds, 2);
        size_t end = sessions_poll(&channel, fds, workload_end);
        poll(fds, end, timeout);

        if (fds[0].revents)
            take_signals(signals);
        channel_step(&channel);
        channel.readable |= frozen;
        sessions_io(&channel, fds + workload_end, end - workload_end);
        workload_io();
        take_input(config);
    }
}
