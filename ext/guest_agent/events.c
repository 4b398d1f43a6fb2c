#define _GNU_SOURCE
#include "events.h"

#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "bytes.h"
#include "util.h"

#define EVENT_BYTES 1024
#define MAX_PHASES 12

static struct {
    bool happened, told, acknowledged;
    uint8_t payload[EVENT_BYTES]; /* u8 event, fields */
    size_t length;
} events[EVENT_COUNT];

static struct {
    const char *name;
    int64_t at;
} phases[MAX_PHASES];
static size_t phase_count;

void event_happened(enum event event, const struct field_writer *fields)
{
    if (events[event].happened)
        return;
    events[event].happened = true;
    events[event].payload[0] = (uint8_t)event;
    events[event].length = 1;
    if (fields && fields->length < EVENT_BYTES) {
        memcpy(events[event].payload + 1, fields->buffer, fields->length);
        events[event].length += fields->length;
    }
}

void event_acknowledged(uint8_t event)
{
    if (event < EVENT_COUNT && events[event].told)
        events[event].acknowledged = true;
}

void events_resend(void)
{
    for (size_t i = 0; i < EVENT_COUNT; i++)
        events[i].told = false;
}

void events_step(struct channel *channel)
{
    /* In the order in which they can happen: the reason comes before the end. */
    static const uint8_t order[] = {EVENT_READY, EVENT_STARTED, EVENT_FATAL, EVENT_EXITED};
    for (size_t n = 0; n < sizeof order; n++) {
        size_t i = order[n];
        uint8_t *at;
        if (!events[i].happened || events[i].told || !(at = channel_room(channel, EVENT_BYTES)))
            continue;
        memcpy(at + HEADER_BYTES, events[i].payload, events[i].length);
        channel_send(channel, FRAME_EVENT, 0, 0, events[i].length);
        events[i].told = true;
    }
}

bool events_settled(void)
{
    for (size_t i = 0; i < EVENT_COUNT; i++)
        if (events[i].happened && !events[i].acknowledged)
            return false;
    return true;
}

void record_outcome(const char *device, uint32_t offset, const uint8_t *nonce)
{
    uint8_t record[OUTCOME_BYTES] = OUTCOME_MAGIC;
    size_t last = events[EVENT_EXITED].happened ? EVENT_EXITED : EVENT_FATAL;
    if (!events[last].happened || !offset)
        return;
    size_t length = NONCE_BYTES + events[last].length;
    memcpy(record + 16, nonce, NONCE_BYTES);
    memcpy(record + 16 + NONCE_BYTES, events[last].payload, events[last].length);
    put_u32(record + 8, (uint32_t)length);
    put_u32(record + 12, crc32_of(record + 16, length));
    int fd = open(device, O_WRONLY | O_CLOEXEC);
    if (fd >= 0 && pwrite(fd, record, sizeof record, offset) == (ssize_t)sizeof record)
        fsync(fd);
    close_fd(&fd);
}

void phase_done(const char *name)
{
    if (phase_count < MAX_PHASES) {
        phases[phase_count].name = name;
        phases[phase_count++].at = now_ms();
    }
}

void put_phases(struct field_writer *writer)
{
    for (size_t i = 0; i < phase_count; i++) {
        uint8_t buffer[64];
        struct field_writer phase = {buffer, sizeof buffer, 0, false};
        put_text_field(&phase, TAG_PHASE_NAME, phases[i].name);
        put_u64_field(&phase, TAG_PHASE_MS, (uint64_t)phases[i].at);
        put_field(writer, TAG_PHASE, buffer, phase.length);
    }
}
