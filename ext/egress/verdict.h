/* What is decided about a request, as data: the rules of mediation in one place, without I/O.
 *
 *   the name that selects the credential = CONNECT or SNI name = Host or :authority = name in the verified certificate
 *
 * The first and the last of these are bound to the connection (struct destination); here the request is held to it.
 */
#ifndef HYPEMAN_EGRESS_VERDICT_H
#define HYPEMAN_EGRESS_VERDICT_H

#include <string.h>

#include "policy.h"

enum reason {
    R_NONE,
    R_BAD_REQUEST,
    R_HEAD_TOO_LARGE,
    R_BAD_HOST,
    R_HOST_MISMATCH,
    R_METHOD,
    R_EXPECTATION,
    R_PLACEHOLDER,
    R_HOST_DENIED,
    R_ADDRESS_LITERAL,
    R_ADDRESS_DENIED,
    R_PORT,
    R_NO_NAME,
    R_MAX_FORWARDS,
    R_RATE,
    R_UNREGISTERED,
    R_RESOLVE,
    R_CONNECT,
    R_CONNECT_TIMEOUT,
    R_CERTIFICATE,
    R_UPSTREAM_TLS,
    R_UPSTREAM_CLOSED,
    R_UPSTREAM_RESPONSE,
    R_UPSTREAM_TIMEOUT,
    R_CLIENT_TIMEOUT,
    R_CLIENT_CLOSED,
    R_CLIENT_TLS,
    R_NOT_TLS,
    R_DRAINING,
    R_BUSY,
    R_CREDENTIAL,
    R_SIGNATURE,
    R_TOO_LARGE,
    R_UNSEARCHABLE,
    R_NO_RULE,
    R_HOST_RULE,
    R_REQUEST_RULE,
    R_PATH,
    R_OVERRIDE,
    R_NOT_APPROVED,
    R_APPROVAL_PENDING,
    R_PG_PROTOCOL, /* this and the following: of logins to databases */
    R_PG_TLS,
    R_MY_PROTOCOL,
    R_MY_HOST,
    R_LOGIN_USER,
    R_LOGIN_PASSWORD,
    R_LOGIN_UPSTREAM,
    R_NO_SITE, /* this and the following: of ingresses */
    R_NO_HEADER,
    R_NOT_RUNNING,
    R_DROPPED,
    R_MOVED,
    R_WANTS_TLS,
    R_PROOF,
    R_COUNT,
};

/* What a program that was refused should do. */
enum next { NEXT_NEVER, NEXT_APPROVAL, NEXT_OTHER_HOST, NEXT_LATER, NEXT_CHANGE };

struct reason_text {
    int status;
    const char *code; /* machine-readable: header X-Hypeman-Egress and JSON "code" */
    const char *message;
    enum next next;
};

extern const struct reason_text REASONS[R_COUNT];

struct destination {
    struct host host;
    uint16_t port;
    bool tls;
    bool postgres; /* TLS begins after a question, and what is in it is the protocol of Postgres */
    bool mysql;    /* the same, after a greeting of the host */
};

/* The connection that a request came by. */
struct origin {
    const struct destination *bound; /* TLS ended here: the name the client asked for; NULL on plain HTTP */
    bool explicit_proxy;             /* plain HTTP by HTTP_PROXY: absolute-form; else origin-form with Host */
    uint16_t port;                   /* plain and transparent: the port that was dialled */
};

enum { MAX_MATCHED = 16, MAX_SET = 28, MAX_SCRUBS = 32, TARGET_MAX = 240 };

/* A field that is written after the guest's own, which lose all of that name. No value: only that. */
struct set_field {
    struct str name, value;
};

/* What was decided about a request by the instance's rules, for its record. */
enum decision { D_NONE, D_ALLOWED, D_DENIED, D_OBSERVED /* would be denied */, D_APPROVED, D_HELD };

struct ruled {
    uint8_t decision; /* enum decision */
    char rule[ACCESS_NAME_MAX + 1];
    char target[TARGET_MAX]; /* path and query, as far as the rule has them recorded; may be cut */
};

struct matched {
    unsigned n;
    const struct rule *rules[MAX_MATCHED];
    unsigned scrubs; /* what is taken out of the response */
    const struct rule *scrub[MAX_SCRUBS];
    unsigned fields;
    struct set_field set[MAX_SET];
    struct str path;    /* instead of the guest's, if there is one */
    bool transforms;    /* a rule needs more than fields whose values are known: see transform.h */
    bool unready;       /* a rule has no valid value now */
    bool certified;     /* the host is shown a certificate when it is connected to */
    const char *detail; /* why it is refused, if that needs saying */
};

/* Whether the instance's rules allow the request; R_APPROVAL_PENDING: somebody has to be asked, unless it
 * was `approved` for the rule of that name. */
enum reason apply_access(const struct snapshot *s, const struct head *h, const struct destination *to, struct str path,
                         int64_t now_s, const char *approved, struct ruled *out);
/* The same for a connection before there is a request; R_NONE. *pass: it need not be read. */
void look_at_access(const struct snapshot *s, const struct destination *to, int64_t now_s, bool *pass,
                    struct ruled *out);
/* Where an HTTP/1 request wants to go and with which path; R_NONE or why not. */
enum reason target_of_h1(const struct head *h, const struct origin *from, struct destination *to, struct str *path);
/* The same for a stream of HTTP/2, whose pseudo-fields are in the head. */
enum reason target_of_h2(const struct head *h, const struct destination *bound);

/* Applies the snapshot: which rules add a field to this request, or why it is refused. */
enum reason apply_policy(const struct snapshot *s, const struct head *h, const struct destination *to, int64_t now_s,
                         struct matched *out);
/* Both: access and policy. */
enum reason decide_request(const struct snapshot *s, const struct head *h, const struct destination *to,
                           struct str path, int64_t now_s, const char *approved, struct ruled *ruled,
                           struct matched *out);
void set_field(struct matched *m, struct str name, struct str value);

/* Whether a field of the client's request goes on to the destination (rules' own fields are added afterwards). */
bool request_field_passes(const struct head *h, const struct field *f, const struct matched *m);
bool response_field_passes(const struct head *h, const struct field *f);
bool trailer_passes(const struct field *f, const struct matched *m);
bool may_upgrade(const struct head *h);
bool is_idempotent(const struct head *h); /* may be sent a second time */
/* R_NONE if the request may go on by one more hop (Max-Forwards, RFC 9110 7.6.2). */
int64_t
max_forwards(const struct head *h); /* as sent, where it counts (OPTIONS, TRACE); -1: not given; -2: malformed */
enum reason check_hops(const struct head *h);
/* Nominated by Connection, in this head. */
bool is_nominated(const struct head *h, struct str name);

/* Bounded text building; `over` once it did not fit. */
struct out {
    char *p;
    size_t n, cap;
    bool over;
};

static inline struct str str_of(const char *text)
{
    return (struct str){text, (uint32_t)strlen(text)};
}

static inline bool str_is(struct str s, const char *text)
{
    return s.n == strlen(text) && memcmp(s.p, text, s.n) == 0;
}

void out_add(struct out *o, const char *p, size_t n);
void out_text(struct out *o, const char *text);
void out_number(struct out *o, uint64_t v);
void out_field(struct out *o, struct str name, struct str value);

enum body { BODY_NONE, BODY_LENGTH, BODY_CHUNKED, BODY_CLOSE };

struct request_line {
    struct str path;
    enum body body;
    uint64_t length;
    bool upgrade; /* Upgrade goes on, with Connection: upgrade */
};

/* The request carries a body although its method gives none a meaning: a host may leave it unread and take it for the
 * next request, so nothing else may follow on its connection. */
bool body_is_undefined(const struct head *h, const struct request_line *line);

void out_via(struct out *o, int minor);
void out_authority(struct out *o, const struct destination *to);
void out_max_forwards(struct out *o, const struct head *h);
void out_request_line(struct out *o, const struct head *h, struct str path);
/* What the connection and the body need, last before the fields that are added. */
void out_framing(struct out *o, const struct head *h, const struct request_line *line);
/* Cuts "scheme://authority" off an absolute-form target; false if it is none. */
bool split_absolute(struct str target, const char *scheme, struct str *authority, struct str *path);

void render_request(struct out *o, const struct head *h, const struct request_line *line, const struct destination *to,
                    const struct matched *m);

#endif
