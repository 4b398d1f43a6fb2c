/* What logins to Postgres and to MySQL have in common; see pgdown.c and mydown.c. */
#ifndef HYPEMAN_EGRESS_LOGIN_H
#define HYPEMAN_EGRESS_LOGIN_H

#include "loop.h"

/* Who logs in, and by which rules. */
struct login {
    enum rule_kind kind;
    const char *method; /* what rules on destinations and records call it */
    char user[129], database[65];
};

static inline struct out login_scratch(const struct conn *c)
{
    return (struct out){c->loop->scratch, 0, SCRATCH, false};
}

void login_begin(struct conn *c, const char *method); /* an exchange, for the records too */
enum reason login_within_limits(struct conn *c);
/* Whether a rule on destinations allows it. */
enum reason login_allowed(const struct conn *c, const struct login *l, const struct snapshot *s, struct ruled *out);
/* The rule with the password; the exchange is noted to be by it. */
enum reason login_find(struct conn *c, const struct login *l, const struct snapshot *s, const struct rule **rule);
/* Both, and whether there is a value; R_APPROVAL_PENDING, R_CREDENTIAL: not yet. */
enum reason login_decide(struct conn *c, const struct login *l, uint64_t *generation);
bool login_may_go_on(const struct conn *c, const struct login *l, const struct snapshot *s);
/* The one host that a client without a server name can mean; it is verified later. `user` NULL: any. */
bool login_only_host(struct conn *c, const struct login *l, const char *user);
/* Some login of the kind to c->to is by a rule. */
bool login_possible(const struct conn *c, enum rule_kind kind);
/* The rule with the password for the host `up`, borrowed from *s; NULL, and it has failed. */
const struct rule *login_password_rule(struct conn *up, const struct login *l, struct snapshot **s);
void login_note_use(struct conn *up); /* the host is shown the password */
enum step login_give_up(struct conn *up, enum reason why, const char *detail);
/* Steps of the guest's side, as long as the connection is in `phase`. */
void login_run(struct conn *c, enum phase phase, enum step (*one_step)(struct conn *c));
const char *login_hint(enum reason why);

#endif
