/* Where an instance may go: ordered rules on hosts, ports, methods and paths, the first that matches decides, else a
 * default. Pure. hypeman/egress/rules.py writes the encoding and is the readable twin that the tests compare with.
 *
 * A look-up costs one hash table probe for the name and one for each of its parent domains, however many rules there
 * are; only rules that name the same host are searched linearly.
 */
#ifndef HYPEMAN_EGRESS_ACCESS_H
#define HYPEMAN_EGRESS_ACCESS_H

#include "encoded.h"
#include "h1.h"
#include "host.h"

enum { MAX_ACCESS_RULES = 1024, MAX_ACCESS_NAMES = 16384, ACCESS_NAME_MAX = 48 };

enum access_action { ACCESS_ALLOW, ACCESS_DENY, ACCESS_ASK };

/* What of a request's target the audit record contains. */
enum access_record { RECORD_HOST, RECORD_PATH, RECORD_QUERY };

struct access_rule {
    struct str name; /* as errors and records call it */
    enum access_action action;
    enum access_record record;
    bool every_host;
    int64_t until_s;    /* not applied from then on; 0: always applied */
    struct ports ports; /* none: every port */
    unsigned methods, paths;
    const struct str *method; /* lower case; none: every method */
    const struct str *path;   /* canonical; '*' is one segment, or at the end anything; none: every path */
};

struct access;

struct access_request {
    const struct host *host;
    uint16_t port;
    struct str method, path; /* path as sent, with query */
    int64_t now_s;
};

struct access_answer {
    enum access_action action;
    const struct access_rule *rule; /* NULL: the default */
    bool ambiguous;                 /* the path could be read in two ways, and a rule on paths would have to decide */
    bool has_method;                /* a rule on methods was involved */
};

/* What is known of a connection before there is a request. */
enum access_look {
    LOOK_PASS,    /* every request would be allowed: nothing has to be read */
    LOOK_REQUEST, /* each request must be decided, or refused in a way that the guest can read */
};

/* `copy` stays valid as long as the result, which points into it. NULL with errno set if it is not an encoding. */
struct access *access_decode(const uint8_t *copy, size_t n);
void access_free(struct access *a);
bool access_observes(const struct access *a); /* decisions are recorded, and nothing is refused */
struct access_answer access_decide(const struct access *a, const struct access_request *r);
enum access_look access_look(const struct access *a, const struct host *h, uint16_t port, int64_t now_s,
                             struct access_answer *first);
/* Whether the rule that decides about this host and port names the port, and does not deny it. */
bool access_names_port(const struct access *a, const struct host *h, uint16_t port, int64_t now_s);

/* The path without query in the one spelling that rules are written in; p NULL if servers could read it differently.
 * `room` holds as many bytes as the path. */
struct str access_path(struct str target, char *room);

#endif
