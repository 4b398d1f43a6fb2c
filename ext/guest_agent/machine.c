#define _GNU_SOURCE
#include "machine.h"

#include <signal.h>
#include <sys/reboot.h>
#include <unistd.h>

#include "events.h"
#include "freezer.h"
#include "root.h"
#include "session.h"
#include "util.h"
#include "workload.h"

/* How long a connected host has to acknowledge; one that is not connected reads the boot disk later. */
#define REPORT_MS 10000
#define REPORT_ABSENT_MS 2000
#define DRAIN_MS 5000
#define KILL_MS 3000

static enum { RUNNING, STOPPING, KILLING, DRAINING, REPORTING, OFF } state;
static int64_t deadline;
static const struct boot_config *config;
static const char *boot_device;
static uint32_t outcome_offset;

void machine_begin(const struct boot_config *boot_config, const char *device, uint32_t offset)
{
    config = boot_config;
    boot_device = device;
    outcome_offset = offset;
}

static void enter(int next, int64_t limit_ms)
{
    state = next;
    deadline = now_ms() + limit_ms;
}

void machine_stop(int signal, uint64_t grace_ms)
{
    if (state != RUNNING && state != STOPPING)
        return;
    if (grace_ms == UINT64_MAX)
        grace_ms = config->grace_ms;
    thaw_guest();
    workload_stop(signal ? signal : (int)config->stop_signal);
    enter(STOPPING, grace_ms > 1000 * 86400 ? 1000 * 86400 : (int64_t)grace_ms);
}

static _Noreturn void power_off(void)
{
    record_outcome(boot_device, outcome_offset, config->nonce);
    quiesce_disks();
    write_file("/proc/sys/kernel/printk", "0"); /* keeps "Power down" out of the instance's log */
    reboot(config->power_off_by_reset ? RB_AUTOBOOT : RB_POWER_OFF);
    for (;;)
        pause();
}

bool machine_over(void)
{
    return state == OFF;
}

int machine_step(struct channel *channel)
{
    bool late = deadline && now_ms() >= deadline;
    if (state == RUNNING && workload_ended())
        enter(DRAINING, DRAIN_MS);
    if (state == STOPPING && (late || !workload_running())) {
        workload_signal(SIGKILL);
        enter(KILLING, KILL_MS);
        late = false;
    }
    if (state == KILLING && (late || !workload_running())) {
        enter(DRAINING, DRAIN_MS);
        late = false;
    }
    if (state == DRAINING && (late || workload_drained())) {
        if (boot_device)
            kill(-1, SIGKILL); /* all but us; sessions still report their exits */
        enter(REPORTING, REPORT_MS);
        late = false;
    }
    if (state == REPORTING && !channel->greeted)
        late |= now_ms() >= deadline - REPORT_MS + REPORT_ABSENT_MS;
    bool told = events_settled() && channel_drained(channel) && sessions_count() == 0 && workload_drained();
    if (state == REPORTING && (late || told)) {
        if (boot_device)
            power_off();
        state = OFF;
    }
    if (state == RUNNING)
        return -1;
    if (state == OFF)
        return 0;
    int64_t left = deadline - now_ms();
    if (state == REPORTING && left > REPORT_ABSENT_MS)
        left = REPORT_ABSENT_MS; /* the host may disconnect meanwhile */
    return left > 0 ? (int)left : 0;
}
