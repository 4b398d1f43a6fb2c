/* Who the guest is and what time it is: set anew after a restore or a fork. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "boot_config.h"
#include "clock.h"
#include "netlink.h"
#include "protocol.h"
#include "system_files.h"
#include "worker.h"

#define MAX_ENTROPY 512

/* Two clones of one memory would draw the same "random" bytes until they are fed different ones. */
static int add_entropy(const uint8_t *data, size_t length) {
    struct {
        struct rand_pool_info info;
        uint8_t data[MAX_ENTROPY];
    } pool = {.info = {.entropy_count = (int)length * 8, .buf_size = (int)length}};
    if (length > MAX_ENTROPY) {
        errno = EMSGSIZE;
        return -1;
    }
    memcpy(pool.info.buf, data, length);
    int fd = open("/dev/urandom", O_WRONLY | O_CLOEXEC);
    int result = fd < 0 ? -1 : ioctl(fd, RNDADDENTROPY, &pool);
    if (result == 0)
        result = ioctl(fd, RNDRESEEDCRNG);
    if (fd >= 0)
        close(fd);
    return result;
}

int identity_worker(struct field_reader *request) {
    const char *hostname = "", *machine_id = "";
    struct network network = {0};
    struct field field, entropy = {0};
    uint8_t nonce[NONCE_BYTES];
    uint64_t clock_ns = 0;
    while (next_field(request, &field)) {
        bool good;
        switch (field.tag) {
        case TAG_HOSTNAME: good = field_text(&field, &hostname); break;
        case TAG_MACHINE_ID: good = field_text(&field, &machine_id); break;
        case TAG_CLOCK_NS: good = field_u64(&field, &clock_ns); break;
        case TAG_NONCE: good = field_bytes(&field, nonce, sizeof nonce); break; /* the agent has taken it */
        case TAG_ENTROPY:
            entropy = field;
            good = true;
            break;
        default: good = take_network_field(&network, &field);
        }
        if (!good)
            return worker_failed(EINVAL, "identity");
    }
    if (request->malformed)
        return worker_failed(EINVAL, "identity");
    if (entropy.length && add_entropy(entropy.value, entropy.length) < 0)
        return worker_failed(errno, "entropy");
    if (set_clock(clock_ns) < 0)
        return worker_failed(errno, "clock");
    if (network.present && replace_network(&network) < 0)
        return worker_failed(errno, "network");
    if (network.present && write_resolver(&network) < 0)
        return worker_failed(errno, "resolver");
    if (set_hostname(hostname, network.present ? network.address : NULL) < 0)
        return worker_failed(errno, "host name");
    if (write_machine_id(machine_id, false) < 0)
        return worker_failed(errno, "machine id");
    return 0;
}
