/* An image whose program is an init (systemd, s6 …, see pid1.h) must see itself as process 1.
 *
 * It becomes process 1 of a PID namespace, with mounts and a control group tree of its own; network, host name
 * and devices are the machine's. So we stay the real process 1: no init can kill or outlive the agent, its exit
 * is seen like any other, and its reboot(2) ends the namespace with a signal that we see (SIGINT: power off, SIGHUP:
 * restart). Mounts that we make later appear inside, too.
 */
#ifndef HM_NAMESPACES_H
#define HM_NAMESPACES_H

#include <stdbool.h>
#include <sys/types.h>

/* In the child that will be the init: mounts and control groups of its own. NULL or what failed (errno). */
const char *make_init_namespaces(void);
/* In the parent, once it runs. */
void remember_init(pid_t pid);

/* Children forked between these two are the init's: it sees them, they die with it. False without an init. */
bool join_init_pids(void);
void leave_init_pids(void);
/* In a child: sees the init's mounts and control groups from now on. NULL or what failed; a no-op without an init. */
const char *join_init_files(void);
/* The init's present control group, below which it can move processes of ours; NULL without an init. */
const char *init_cgroup(void);

#endif
