#define _GNU_SOURCE
#include "identity.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "clock.h"
#include "netlink.h"
#include "protocol.h"
#include "system_files.h"

#define MAX_ENTROPY 512

/* Two clones of one memory would draw the same "random" bytes until they are fed different ones. */
static int add_entropy(const uint8_t *data, size_t length)
{
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

struct identity {
    const char *hostname, *machine_id;
    struct network network;
    struct field entropy;
    uint8_t nonce[NONCE_BYTES];
    bool has_nonce;
    uint64_t clock_ns;
};

static bool parse_identity(struct identity *identity, struct field_reader *request)
{
    struct field field;
    *identity = (struct identity){.hostname = "", .machine_id = ""};
    while (next_field(request, &field)) {
        bool good = true;
        switch (field.tag) {
        case TAG_HOSTNAME:
            good = field_text(&field, &identity->hostname);
            break;
        case TAG_MACHINE_ID:
            good = field_text(&field, &identity->machine_id);
            break;
        case TAG_CLOCK_NS:
            good = field_u64(&field, &identity->clock_ns);
            break;
        case TAG_NONCE:
            good = identity->has_nonce = field_bytes(&field, identity->nonce, NONCE_BYTES);
            break;
        case TAG_ENTROPY:
            identity->entropy = field;
            break;
        default:
            good = parse_network_field(&identity->network, &field);
        }
        if (!good)
            return false;
    }
    return !request->malformed;
}

/* The guest's present identity: that of its boot until a request changes it. After a change that failed halfway it is
 * unknown, and the next one is applied in full. */
static struct {
    bool asked, known;
    char hostname[256];
    struct network network;
} current;

static void remember(const char *hostname, const struct network *network)
{
    current.known = strlen(hostname) < sizeof current.hostname;
    if (current.known)
        strcpy(current.hostname, hostname);
    current.network = *network;
}

static bool same_dns(const struct network *a, const struct network *b)
{
    return a->dns_count == b->dns_count && memcmp(a->dns, b->dns, a->dns_count * sizeof *a->dns) == 0;
}

static bool same_network(const struct network *a, const struct network *b)
{
    return a->present == b->present
        && (!a->present
            || (memcmp(a->mac, b->mac, sizeof a->mac) == 0 && memcmp(a->address, b->address, sizeof a->address) == 0
                && memcmp(a->gateway, b->gateway, sizeof a->gateway) == 0 && a->prefix == b->prefix && a->mtu == b->mtu
                && same_dns(a, b)));
}

/* Changes what differs. 0, or -1 with errno and what failed. */
static int change_identity(const struct identity *asked, const char **failed)
{
    const struct network *network = &asked->network;
    bool renamed = !current.known || strcmp(asked->hostname, current.hostname) != 0;
    bool moved = network->present && (!current.known || !same_network(network, &current.network));
    *failed = "entropy";
    if (asked->entropy.length && add_entropy(asked->entropy.value, asked->entropy.length) < 0)
        return -1;
    *failed = "clock";
    if (set_clock(asked->clock_ns) < 0)
        return -1;
    *failed = "network";
    if (moved && replace_network(network) < 0)
        return -1;
    *failed = "resolver";
    if (moved && !(current.known && same_dns(network, &current.network)) && write_resolver(network) < 0)
        return -1;
    *failed = "host name";
    if ((renamed || moved) && set_hostname(asked->hostname, network->present ? network->address : NULL) < 0)
        return -1;
    *failed = "machine id";
    return write_machine_id(asked->machine_id, false);
}

int apply_identity(const struct boot_config *config, struct field_reader request, uint8_t *nonce, const char **failed)
{
    struct identity asked;
    *failed = "identity";
    if (!parse_identity(&asked, &request)) {
        errno = EINVAL;
        return -1;
    }
    if (asked.has_nonce)
        memcpy(nonce, asked.nonce, NONCE_BYTES); /* the next connection is with a host that knows the new one */
    if (!current.asked)
        remember(config->hostname ? config->hostname : "", &config->network);
    current.asked = true;
    if (change_identity(&asked, failed) < 0) {
        current.known = false;
        return -1;
    }
    remember(asked.hostname, &asked.network);
    return 0;
}
