/* The guest's one interface, by rtnetlink: no ip, no ifconfig, no DHCP. */
#ifndef HM_NETLINK_H
#define HM_NETLINK_H

#include "boot_config.h"

/* Loopback up. 0 or -1 with errno. */
int bring_up_loopback(void);

/* Gives the interface with network->mac its address, MTU and default route, and brings it up. */
int configure_network(const struct network *network);

/* A fork wakes up with its source's interface: gives it the new MAC and address, drops all others, then configures it
 * like a fresh one. */
int replace_network(const struct network *network);

#endif
