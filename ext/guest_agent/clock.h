/* The guest's clock, which the host corrects: it asks for our time, computes the difference and sends it to us. A
 * difference stays right however late it arrives; a time of day would not.
 */
#ifndef HM_CLOCK_H
#define HM_CLOCK_H

#include <stdbool.h>
#include <stdint.h>

#include "channel.h"
#include "fields.h"
#include "session.h"

/* Called by process 1 of a guest. Before it nothing here changes the clock: in tests, that is the host's own. */
void clock_begin(void);
/* Not earlier than this, nanoseconds since 1970: the boot disk was written before the boot. */
void clock_at_least(uint64_t ns);
/* Nanoseconds since 1970; 0 leaves the clock alone. 0 or -1 with errno. */
int set_clock(uint64_t ns);
/* Whether the host has set the clock since the boot. */
bool clock_was_set(void);
/* Answers OP_CLOCK. In the agent's loop, since the answer must be quick. */
void answer_clock(struct channel *channel, struct session *session, struct field_reader *request);

#endif
