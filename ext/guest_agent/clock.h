#ifndef HM_CLOCK_H
#define HM_CLOCK_H

#include <stdint.h>

/* Nanoseconds since 1970; 0 leaves the clock alone. 0 or -1 with errno. */
int set_clock(uint64_t ns);

#endif
