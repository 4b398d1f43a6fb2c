/* Who the guest is and what time it is: set anew after a restore or a fork.
 *
 * A guest that is restored is who it was: it only needs the time and entropy, which the agent gives it at once. Only
 * one that becomes another has its network, names and files changed, by a worker. Taking the network down and up again
 * takes a just restored guest 50 ms, a fork of the agent as long.
 */
#ifndef HM_IDENTITY_H
#define HM_IDENTITY_H

#include "boot_config.h"
#include "fields.h"

enum identity_change {
    IDENTITY_SAME,   /* and now has clock and entropy */
    IDENTITY_OTHER,  /* identity_worker makes it so; nothing is done yet */
    IDENTITY_FAILED, /* errno, and what failed */
};

/* Also takes the nonce of later connections, if there is one. */
enum identity_change take_identity(const struct boot_config *config, struct field_reader request, uint8_t *nonce,
                                   const char **failed);

#endif
