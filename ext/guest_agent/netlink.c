#define _GNU_SOURCE
#include "netlink.h"

#include <dirent.h>
#include <errno.h>
#include <linux/if_addr.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "util.h"

/* One request; attributes are appended behind the family's header. */
struct message {
    struct nlmsghdr header;
    uint8_t body[256];
};

static void begin(struct message *m, uint16_t type, uint16_t flags, const void *family_header, size_t length)
{
    memset(m, 0, sizeof *m);
    m->header.nlmsg_type = type;
    m->header.nlmsg_flags = (uint16_t)(NLM_F_REQUEST | NLM_F_ACK | flags);
    m->header.nlmsg_len = (uint32_t)NLMSG_LENGTH(length);
    memcpy(NLMSG_DATA(&m->header), family_header, length);
}

static void add(struct message *m, uint16_t type, const void *value, uint16_t length)
{
    struct rtattr *attribute = (struct rtattr *)((char *)m + NLMSG_ALIGN(m->header.nlmsg_len));
    attribute->rta_type = type;
    attribute->rta_len = (uint16_t)RTA_LENGTH(length);
    memcpy(RTA_DATA(attribute), value, length);
    m->header.nlmsg_len = (uint32_t)(NLMSG_ALIGN(m->header.nlmsg_len) + RTA_ALIGN(attribute->rta_len));
}

/* Sends one request and waits for its acknowledgement. */
static int send_request(int fd, struct message *m)
{
    struct {
        struct nlmsghdr header;
        struct nlmsgerr error;
        uint8_t rest[512];
    } answer;
    if (send(fd, m, m->header.nlmsg_len, 0) < 0)
        return -1;
    ssize_t n = recv(fd, &answer, sizeof answer, 0);
    if (n < (ssize_t)NLMSG_LENGTH(sizeof(int)) || answer.header.nlmsg_type != NLMSG_ERROR) {
        errno = EPROTO;
        return -1;
    }
    errno = -answer.error.error;
    return answer.error.error == 0 ? 0 : -1;
}

static int open_netlink(void)
{
    return socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
}

static int change_link(int fd, int index, bool up, const uint8_t *mac, uint32_t mtu)
{
    struct message m;
    struct ifinfomsg link = {.ifi_index = index, .ifi_change = IFF_UP, .ifi_flags = up ? IFF_UP : 0};
    begin(&m, RTM_NEWLINK, 0, &link, sizeof link);
    if (mac)
        add(&m, IFLA_ADDRESS, mac, 6);
    if (mtu)
        add(&m, IFLA_MTU, &mtu, sizeof mtu);
    return send_request(fd, &m);
}

static int add_address(int fd, int index, const struct network *network)
{
    struct message m;
    struct ifaddrmsg address = {.ifa_family = AF_INET,
                                .ifa_prefixlen = network->prefix,
                                .ifa_index = (unsigned)index,
                                .ifa_scope = RT_SCOPE_UNIVERSE};
    uint8_t broadcast[4];
    for (int i = 0; i < 4; i++) {
        int bits = network->prefix - 8 * i;
        uint8_t mask = bits >= 8 ? 0xff : bits <= 0 ? 0 : (uint8_t)(0xff << (8 - bits));
        broadcast[i] = (uint8_t)(network->address[i] | (uint8_t)~mask);
    }
    begin(&m, RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &address, sizeof address);
    add(&m, IFA_LOCAL, network->address, 4);
    add(&m, IFA_ADDRESS, network->address, 4);
    if (network->prefix < 31)
        add(&m, IFA_BROADCAST, broadcast, 4);
    return send_request(fd, &m);
}

/* On-link, because a routed TAP may give its guest a /32. */
static int add_default_route(int fd, int index, const struct network *network)
{
    struct message m;
    struct rtmsg route = {.rtm_family = AF_INET,
                          .rtm_table = RT_TABLE_MAIN,
                          .rtm_protocol = RTPROT_BOOT,
                          .rtm_scope = RT_SCOPE_UNIVERSE,
                          .rtm_type = RTN_UNICAST,
                          .rtm_flags = RTNH_F_ONLINK};
    begin(&m, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &route, sizeof route);
    add(&m, RTA_GATEWAY, network->gateway, 4);
    add(&m, RTA_OIF, &index, sizeof index);
    return send_request(fd, &m);
}

static bool read_mac(const char *name, uint8_t mac[6])
{
    char path[300], text[32];
    unsigned b[6];
    snprintf(path, sizeof path, "/sys/class/net/%s/address", name);
    if (read_file(path, text, sizeof text) < 0
        || sscanf(text, "%x:%x:%x:%x:%x:%x", &b[0], &b[1], &b[2], &b[3], &b[4], &b[5]) != 6)
        return false;
    for (int i = 0; i < 6; i++)
        mac[i] = (uint8_t)b[i];
    return true;
}

static bool is_hardware(const char *name)
{
    char path[300];
    snprintf(path, sizeof path, "/sys/class/net/%s/device", name);
    return access(path, F_OK) == 0;
}

/* The index of the interface with this MAC; without one (`mac` NULL) the first on real hardware. 0: none. */
static int find_link(const uint8_t *mac)
{
    DIR *dir = opendir("/sys/class/net");
    int index = 0;
    for (struct dirent *entry; dir && !index && (entry = readdir(dir));) {
        uint8_t its[6];
        if (entry->d_name[0] == '.')
            continue;
        if (mac ? read_mac(entry->d_name, its) && memcmp(its, mac, 6) == 0 : is_hardware(entry->d_name))
            index = (int)if_nametoindex(entry->d_name);
    }
    if (dir)
        closedir(dir);
    return index;
}

/* Removes all addresses but `kept`. */
static int flush_addresses(int fd, int index, const uint8_t kept[4])
{
    struct {
        struct nlmsghdr header;
        struct ifaddrmsg address;
    } dump = {{sizeof dump, RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP, 0, 0}, {.ifa_family = AF_INET}};
    struct ifaddrmsg found[16];
    uint8_t local[LENGTH(found)][4];
    size_t count = 0;
    if (send(fd, &dump, sizeof dump, 0) < 0)
        return -1;
    for (bool done = false; !done;) {
        _Alignas(struct nlmsghdr) uint8_t answer[8192];
        ssize_t left = recv(fd, answer, sizeof answer, 0);
        if (left <= 0)
            return -1;
        for (struct nlmsghdr *h = (struct nlmsghdr *)answer; NLMSG_OK(h, left); h = NLMSG_NEXT(h, left)) {
            if (h->nlmsg_type == NLMSG_DONE || h->nlmsg_type == NLMSG_ERROR) {
                done = true;
                break;
            }
            struct ifaddrmsg *address = NLMSG_DATA(h);
            if ((int)address->ifa_index != index || count == LENGTH(found))
                continue;
            int length = (int)IFA_PAYLOAD(h);
            for (struct rtattr *a = IFA_RTA(address); RTA_OK(a, length); a = RTA_NEXT(a, length)) {
                if (a->rta_type != IFA_LOCAL || RTA_PAYLOAD(a) != 4)
                    continue;
                found[count] = *address;
                memcpy(local[count], RTA_DATA(a), 4);
                count += memcmp(local[count], kept, 4) != 0;
                break;
            }
        }
    }
    for (size_t i = 0; i < count; i++) {
        struct message m;
        begin(&m, RTM_DELADDR, 0, &found[i], sizeof found[i]);
        add(&m, IFA_LOCAL, local[i], 4);
        if (send_request(fd, &m) < 0 && errno != EADDRNOTAVAIL) /* a secondary address goes with its primary */
            return -1;
    }
    return 0;
}

int bring_up_loopback(void)
{
    int fd = open_netlink();
    if (fd < 0)
        return -1;
    int result = change_link(fd, 1, true, NULL, 0);
    close(fd);
    return result;
}

static int configure_link(int fd, int index, const struct network *network)
{
    static const uint8_t none[4];
    if (change_link(fd, index, true, NULL, network->mtu) < 0 || add_address(fd, index, network) < 0)
        return -1;
    return memcmp(network->gateway, none, 4) == 0 ? 0 : add_default_route(fd, index, network);
}

static int configured; /* the index of the interface of the boot: a fork need not look for it */

int configure_network(const struct network *network)
{
    int index = configured = find_link(network->mac);
    int fd = open_netlink();
    int result = -1;
    errno = ENODEV;
    if (index && fd >= 0)
        result = configure_link(fd, index, network);
    close_fd(&fd);
    return result;
}

/* virtio-net takes a new MAC while it is up; taking it down and up again makes the kernel wait for all CPUs several
 * times, and was a third of what a fork's identity took. */
static int change_mac(int fd, int index, const uint8_t *mac)
{
    if (change_link(fd, index, true, mac, 0) == 0)
        return 0;
    return errno == EBUSY && change_link(fd, index, false, NULL, 0) == 0 ? change_link(fd, index, false, mac, 0) : -1;
}

int replace_network(const struct network *network)
{
    int index = configured ? configured : find_link(network->mac);
    if (!index)
        index = find_link(NULL);
    int fd = open_netlink();
    int result = -1;
    errno = ENODEV;
    /* The route last: it goes with the last of the old addresses. */
    if (index && fd >= 0 && change_mac(fd, index, network->mac) == 0 && add_address(fd, index, network) == 0
        && flush_addresses(fd, index, network->address) == 0)
        result = configure_link(fd, index, network);
    close_fd(&fd);
    return result;
}
