/* Stops everything in the guest but us, so that a fork gets its identity and a restored guest its clock before
 * their programs run on. */
#ifndef HM_FREEZER_H
#define HM_FREEZER_H

#include <stdint.h>

/* 0 or an errno. A freeze ends by itself after FREEZE_LIMIT_MS of the guest's own time: a host that dies in
 * the middle must not leave a guest stopped. */
int freeze_guest(void);
int thaw_guest(void);
/* Thaws when it is time; milliseconds until then, -1 if nothing is frozen. */
int freezer_step(void);

#define FREEZE_LIMIT_MS 10000

#endif
