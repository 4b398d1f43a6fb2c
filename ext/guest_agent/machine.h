/* The life of this boot from the first event to power-off.
 *
 *   RUNNING ──stop──▶ STOPPING ──its end, or the grace is over──▶ KILLING ──▶ DRAINING ──▶ REPORTING ──▶ off
 *      └──the main process ends─────────────────────────────────────────────────▲
 *
 * DRAINING waits for the last output to reach the console, REPORTING for the host to acknowledge the events;
 * both have a time limit.
 */
#ifndef HM_MACHINE_H
#define HM_MACHINE_H

#include <stdbool.h>
#include <stdint.h>

#include "boot_config.h"
#include "channel.h"

void machine_begin(const struct boot_config *config, const char *boot_device, uint32_t outcome_offset);
/* Ends the main process with a signal (0: the image's own), after grace_ms with SIGKILL; UINT64_MAX: the grace of the
 * boot disk. */
void machine_stop(int signal, uint64_t grace_ms);
/* Enters the next state when due; powers off at the end. Milliseconds to the next deadline, -1 for none. */
int machine_step(struct channel *channel);
/* In tests there is no machine: stopping ends the program. */
bool machine_over(void);

#endif
