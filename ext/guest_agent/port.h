#ifndef HM_PORT_H
#define HM_PORT_H

#define LOG_PORT_NAME "hypeman.log"

/* Opens the virtio-serial port with this name (there is no udev to make links for us); -1 without one. */
int open_port(const char *name, int flags);

#endif
