/* Handles frames of the host: opens, feeds and ends sessions. */
#ifndef HM_REQUEST_H
#define HM_REQUEST_H

#include <stdbool.h>

#include "boot_config.h"
#include "channel.h"

/* False if the frame breaks the protocol; the connection is then lost. */
bool handle_frame(const struct boot_config *config, struct channel *channel, const struct frame *frame);

#endif
