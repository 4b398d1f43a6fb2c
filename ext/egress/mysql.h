/* What the two sides of a login to MySQL share; see mydown.c. */
#ifndef HYPEMAN_EGRESS_MYSQL_H
#define HYPEMAN_EGRESS_MYSQL_H

#include "login.h"
#include "scramble.h"

enum my_stage { M_NEW, M_GREETED, M_TLS, M_SWITCHED, M_HOST };
enum my_host_stage { MH_NEW, MH_GREETING, MH_GREETED, MH_SHAKING, MH_ASKED };

struct mysql {
    enum my_stage stage;
    enum my_host_stage host;
    struct login login;
    bool named;        /* c->to.host is the one that it means */
    bool known;        /* it has the placeholder */
    bool refusing;     /* what it has sent */
    bool failed;       /* it is to be told, when it has had its turn */
    char failure[480]; /* which clients take 512 bytes of */
    unsigned failure_code;
    const char *failure_state;
    bool by_sha2;                      /* and has shown it so: clients expect a packet more */
    uint8_t sequence;                  /* of the next packet, to the guest or from it */
    uint8_t host_sequence;             /* the same for the host */
    uint32_t offered, offered_further; /* capabilities */
    char scramble[MY_SCRAMBLE];        /* the guest's */
    const char *plugin;                /* for it */
    struct str response;               /* body of the guest's first packet; allocated */
    struct my_login answered;          /* what it says; points into it */
    size_t heard;                      /* bytes of the host until the session is ready */
    struct my_greeting theirs;         /* the host's; its texts are in the following */
    char version[MY_VERSION_MAX], their_plugin[MY_PLUGIN_MAX];
    bool switched; /* the host has asked for another way to authenticate */
    bool proved;   /* it has been shown the password */
    bool asked_by_sha2;
};

/* mydown.c */
void my_greet(struct conn *c, const struct my_greeting *g); /* as the host did */
/* myup.c */
void my_begin_host(struct conn *up); /* the guest may log in now */
void my_log_in_host(struct conn *up);

#endif
