#define _GNU_SOURCE
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <unistd.h>

#include "agent.h"
#include "boot_config.h"
#include "clock.h"
#include "disk.h"
#include "events.h"
#include "rlimits.h"
#include "machine.h"
#include "modules.h"
#include "netlink.h"
#include "root.h"
#include "system_files.h"
#include "util.h"
#include "workload.h"

static struct boot_config config;

/* Descriptors 0, 1 and 2 are /dev/null, so that nothing of ours ends up in the instance's log by accident. */
static void open_standard_files(void)
{
    int fd = open("/dev/null", O_RDWR);
    for (int i = 0; fd >= 0 && i < 3; i++)
        if (i != fd)
            dup2(fd, i);
    if (fd > 2)
        close(fd);
}

static void protect_ourselves(void)
{
    struct rlimit files = {4096, 4096};
    write_file("/proc/self/oom_score_adj", "-1000");
    setrlimit(RLIMIT_NOFILE, &files);
    reboot(RB_DISABLE_CAD);
    signal(SIGPIPE, SIG_IGN);
    /* The console is the instance's log: of the kernel only what is fatal. */
    klogctl(8, NULL, 1);
}

static const char *configure_system(void)
{
    static char text[128];
    const char *step = NULL;
    clock_at_least(config.clock_ns);
    /* IPv6 is off until it is filtered as IPv4 is. */
    write_file("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1");
    write_file("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    write_file("/sys/devices/system/memory/auto_online_blocks", "online_movable");
    if (bring_up_loopback() < 0)
        step = "loopback";
    else if (config.network.present && configure_network(&config.network) < 0)
        step = "network";
    else if (set_hostname(config.hostname, config.network.present ? config.network.address : NULL) < 0)
        step = "host name";
    else if (link_mount_table() < 0)
        step = "mount table";
    else if (write_resolver(&config.network) < 0)
        step = "resolver";
    else if (write_machine_id(config.machine_id, false) < 0)
        step = "machine id";
    else if (install_cas(config.cas, config.ca_count) < 0)
        step = "certificates";
    if (!step)
        return set_kernel_limits(&config);
    snprintf(text, sizeof text, "cannot set up the %s: %s", step, strerror(errno));
    return text;
}

static const char *prepare(void)
{
    const char *failure = mount_root(&config);
    if (!failure)
        failure = switch_root();
    if (!failure)
        failure = mount_late(config.shm_bytes);
    if (failure)
        return failure;
    phase_done("root");
    make_volume_dirs(&config);
    for (size_t i = 0; !failure && i < config.volume_count; i++)
        failure = mount_volume(&config, &config.volumes[i], BOOT_DISK_WAIT_MS);
    if (!failure && config.volume_count)
        phase_done("volumes");
    if (!failure)
        failure = configure_system();
    if (!failure)
        phase_done("network");
    return failure;
}

static _Noreturn void give_up(const char *failure)
{
    console_print(failure);
    sleep_ms(100); /* until the serial line has sent it */
    reboot(RB_POWER_OFF);
    reboot(RB_AUTOBOOT);
    for (;;)
        pause();
}

_Noreturn void init_run(void)
{
    static char boot_device[DEVICE_PATH_BYTES];
    uint32_t outcome_offset = 0;
    const char *failure = mount_early();
    open_standard_files();
    protect_ourselves();
    clock_begin();
    phase_done("kernel");
    if (!failure) {
        load_modules();
        phase_done("modules");
        failure = read_boot_disk(&config, boot_device, &outcome_offset);
    }
    if (failure)
        give_up(failure);
    phase_done("boot_disk");
    failure = prepare();
    workload_prepare(&config);
    machine_begin(&config, boot_device, outcome_offset);
    if (failure)
        workload_fatal(failure);
    else
        workload_hold(&config);
    agent_run(&config, -1);
    give_up("the agent's loop ended");
}
