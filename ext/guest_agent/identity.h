/* Who the guest is and what time it is: set anew after a restore or a fork.
 *
 * The agent does all of it itself, and only what differs. The guest's programs are frozen, so nobody waits meanwhile;
 * in a guest that was just restored a worker takes as long to start as everything else together, and so did taking
 * the network down and up again.
 */
#ifndef HM_IDENTITY_H
#define HM_IDENTITY_H

#include "boot_config.h"
#include "fields.h"

/* 0, or -1 with errno and what failed. Also takes the nonce of later connections, if there is one. */
int take_identity(const struct boot_config *config, struct field_reader request, uint8_t *nonce, const char **failed);

#endif
