/* Files of the root that identify this machine: host name, hosts, resolver, machine id, certificates. */
#ifndef HM_SYSTEM_FILES_H
#define HM_SYSTEM_FILES_H

#include "boot_config.h"

/* sethostname, /etc/hostname and /etc/hosts; address NULL without a network. */
int set_hostname(const char *hostname, const uint8_t *address);
/* /etc/mtab, a link to the kernel's own table, unless the image has one. */
int link_mount_table(void);
/* /etc/resolv.conf, as a file of its own even where the image has a symlink. Nothing without name servers. */
int write_resolver(const struct network *network);
/* /etc/machine-id, where the image has one or `always` is set, and the D-Bus copy where it is a file. */
int write_machine_id(const char *machine_id, bool always);
/* The certificates into whatever trust stores the image has, and into CA_BUNDLE, which always exists then. */
int install_cas(const struct ca_certificate *cas, size_t count);

#define CA_DIR "/etc/hypeman"
#define CA_BUNDLE CA_DIR "/ca-bundle.pem" /* the image's roots and ours */
#define CA_ONLY CA_DIR "/ca.pem"          /* ours alone */

#endif
