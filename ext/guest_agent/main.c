/* hypeman-init: what runs first in every guest, and serves its host until the end.
 *
 *   as process 1    mounts the root, sets up the system, starts the image's program, is the agent (init.c)
 *   --agent-fd N --nonce HEX --root DIR [--idle LOG]
 *                   only the agent, on the socket N, unprivileged: how the tests drive it
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent.h"
#include "boot_config.h"
#include "events.h"
#include "init.h"
#include "machine.h"
#include "session.h"
#include "worker.h"
#include "workload.h"

static bool parse_nonce(const char *text, uint8_t nonce[NONCE_BYTES])
{
    unsigned byte;
    if (strlen(text) != 2 * NONCE_BYTES)
        return false;
    for (size_t i = 0; i < NONCE_BYTES; i++) {
        if (sscanf(text + 2 * i, "%2x", &byte) != 1)
            return false;
        nonce[i] = (uint8_t)byte;
    }
    return true;
}

static int run_test_agent(int argc, char **argv)
{
    static struct boot_config config;
    const char *log = NULL;
    int fd = -1;
    config.cwd = "/";
    config.user = "";
    config.grace_ms = 1000;
    config.stop_signal = SIGTERM;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--agent-fd") == 0)
            fd = atoi(argv[i + 1]);
        else if (strcmp(argv[i], "--root") == 0)
            set_worker_root(argv[i + 1]);
        else if (strcmp(argv[i], "--no-agent") == 0)
            config.skip_agent = true;
        else if (strcmp(argv[i], "--idle") == 0)
            log = argv[i + 1];
        else if (strcmp(argv[i], "--keep-ms") == 0)
            keep_ms = atoi(argv[i + 1]);
        else if (strcmp(argv[i], "--nonce") != 0 || !parse_nonce(argv[i + 1], config.nonce))
            return 2;
    }
    if (fd < 0)
        return 2;
    signal(SIGPIPE, SIG_IGN);
    config.env = config.argv = config.strings;
    machine_begin(&config, NULL, 0);
    if (log) {
        config.idle = true;
        console_open(log);
        workload_hold(&config);
    } else {
        event_happened(EVENT_READY, NULL);
    }
    agent_run(&config, fd);
    return 0;
}

int main(int argc, char **argv)
{
    if (getpid() == 1 && argc >= 1 && access("/init", F_OK) == 0)
        init_run();
    return run_test_agent(argc, argv);
}
