/* Resource limits of programs and settings of the kernel, as Docker's or better. */
#ifndef HM_RLIMITS_H
#define HM_RLIMITS_H

#include "boot_config.h"

/* Writes the kernel's settings, first ours, then those of the boot configuration. NULL, or an error message. */
const char *set_kernel_limits(const struct boot_config *config);
/* In a fresh child: the limits of this boot, which set_kernel_limits has stored. */
void limit_process(void);

#endif
