#define _GNU_SOURCE
#include "clock.h"

#include <errno.h>
#include <string.h>
#include <sys/timex.h>
#include <time.h>

#include "protocol.h"
#include "util.h"

#define SECOND 1000000000
/* Smaller differences are corrected gradually (0.5 ms per second), so that time neither jumps nor goes backwards. */
#define STEP_FROM_NS 10000000

static bool may_set, was_set;

void clock_begin(void)
{
    may_set = true;
}
bool clock_was_set(void)
{
    return was_set;
}

static uint64_t read_clock(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * SECOND + (uint64_t)now.tv_nsec;
}

int set_clock(uint64_t ns)
{
    struct timespec now = {(time_t)(ns / SECOND), (long)(ns % SECOND)};
    return ns && may_set ? clock_settime(CLOCK_REALTIME, &now) : 0;
}

void clock_at_least(uint64_t ns)
{
    if (read_clock() < ns)
        set_clock(ns);
}

static int slew(int64_t delta)
{
    struct timex change = {.modes = ADJ_OFFSET_SINGLESHOT, .offset = (long)(delta / 1000)};
    return adjtimex(&change) < 0 ? -1 : 0;
}

static int step(int64_t delta)
{
    /* In microseconds: the kernel would keep nanoseconds as the unit of adjtimex(2) for all callers. */
    struct timex change = {.modes = ADJ_SETOFFSET};
    int64_t us = delta / 1000;
    change.time.tv_sec = (time_t)(us / 1000000);
    change.time.tv_usec = (suseconds_t)(us % 1000000);
    if (change.time.tv_usec < 0) {
        change.time.tv_sec--;
        change.time.tv_usec += 1000000;
    }
    slew(0); /* what is left of an earlier correction is part of this one */
    return clock_adjtime(CLOCK_REALTIME, &change) < 0 ? -1 : 0;
}

/* A guest that runs an NTP client of its own (the kernel then counts as synchronised) is not disturbed by small
 * corrections; after a pause or a restore it is moved like any other. */
static bool keeps_own_time(void)
{
    struct timex now = {0};
    return adjtimex(&now) >= 0 && !(now.status & STA_UNSYNC);
}

static int move_clock(int64_t delta)
{
    bool small = delta > -STEP_FROM_NS && delta < STEP_FROM_NS;
    if (delta == 0 || !may_set)
        return 0;
    if (!small || !was_set)
        return step(delta);
    return keeps_own_time() ? 0 : slew(delta);
}

void answer_clock(struct channel *channel, struct session *session, struct field_reader *request)
{
    struct field field;
    uint64_t value;
    int result = 0;
    bool sets = false;
    while (result == 0 && next_field(request, &field)) {
        bool good = (field.tag == TAG_CLOCK_NS || field.tag == TAG_CLOCK_DELTA_NS) && field_u64(&field, &value);
        request->malformed |= !good;
        if (good)
            result = field.tag == TAG_CLOCK_NS ? set_clock(value) : move_clock((int64_t)value);
        sets = true;
    }
    if (request->malformed || result < 0) {
        session_refuse(session, request->malformed ? EINVAL : errno, "the clock cannot be set");
        return;
    }
    was_set |= sets;
    uint8_t *at = channel_room(channel, 64);
    if (at) {
        struct field_writer reply = {at + HEADER_BYTES, 64, 0, false};
        put_u64_field(&reply, TAG_CLOCK_NS, read_clock());
        channel_send(channel, FRAME_DATA, 0, session->id, reply.length);
        session->credit -= (uint32_t)reply.length;
    }
    session_refuse(session, 0, "");
}
