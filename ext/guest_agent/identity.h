/* The guest's identity: set again after a restore or a fork.
 *
 * The agent changes it itself, without a worker, and only what differs. The guest's programs are frozen, so blocking
 * delays nobody; in a guest that was just restored, starting a worker takes as long as everything else together, as did
 * taking the network down and up again.
 */
#ifndef HM_IDENTITY_H
#define HM_IDENTITY_H

#include "boot_config.h"
#include "fields.h"

/* 0, or -1 with errno and what failed. Also takes the nonce of later connections, if there is one. */
int apply_identity(const struct boot_config *config, struct field_reader request, uint8_t *nonce, const char **failed);

#endif
