/* What engine.c and loop.c share: the shared state and the letters a loop gets. */
#ifndef HYPEMAN_EGRESS_LOOP_H
#define HYPEMAN_EGRESS_LOOP_H

#include "egress.h"

enum { ORDER_ACCEPT = 1, ORDER_SWEEP = 2, ORDER_DRAIN = 4 };

struct answer {
    struct answer *next;
    uint64_t token;
    bool decision, allow; /* about a request that is held, instead of addresses */
    unsigned n;
    struct addr addresses[MAX_ADDRESSES];
};

struct question {
    struct question *next;
    unsigned loop;
    uint64_t token;
    char instance[INSTANCE_MAX]; /* who asks: look-ups are shared out among instances */
    char name[HOST_MAX];
};

struct asked {
    struct asked *next;
    struct approval a;
};

struct engine {
    struct table table;
    struct reach reach;
    unsigned timers_ms[T_CLASSES];
    uint16_t listen_port, assumed_tls_port;
    SSL_CTX *client;
    unsigned n;
    struct loop *loops;
    unsigned started;
    atomic_uint grace_ms;
    atomic_uint running;
    int question_fd, audit_fd;
    pthread_mutex_t question_lock;
    struct question *first_question, *last_question;
    struct asked *first_asked, *last_asked;
    uint64_t last_token;
};

void loop_answer(struct loop *l, struct answer *a); /* takes over a */
void loop_order(struct loop *l, unsigned orders);
/* Asks the resolver; the answer comes to up_answer with the returned token. 0: there is no memory. */
uint64_t engine_ask_approval(struct engine *e, const struct approval *a); /* the decision comes to held_decided */
uint64_t engine_ask(struct engine *e, unsigned loop, const char *instance, const char *name);

#endif
