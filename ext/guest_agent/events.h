/* What the guest reports by itself: each event happens at most once a boot, is sent on every connection, and is
 * acknowledged by the host. */
#ifndef HM_EVENTS_H
#define HM_EVENTS_H

#include <stdbool.h>
#include <stdint.h>

#include "channel.h"
#include "fields.h"
#include "protocol.h"

/* Records an event; its fields are what the writer holds (may be NULL). */
void event_happened(enum event event, const struct field_writer *fields);
void event_acknowledged(uint8_t event);
/* A new connection: every event is sent again. */
void events_resend(void);
void events_step(struct channel *channel);
/* All recorded events have been acknowledged. */
bool events_settled(void);
/* Writes the event that ended this boot to the boot disk, for a host that was not connected. */
void record_outcome(const char *device, uint32_t offset, const uint8_t *nonce);

/* Milliseconds since the kernel started, kept under a name for EVENT_READY. */
void phase_done(const char *name);
void put_phases(struct field_writer *writer);

#endif
