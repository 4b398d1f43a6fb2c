/* What engine.c and loop.c share: the shared state and the letters a loop gets. */
#ifndef HYPEMAN_EGRESS_LOOP_H
#define HYPEMAN_EGRESS_LOOP_H

#include "certs.h"
#include "egress.h"

enum { ORDER_ACCEPT = 1, ORDER_SWEEP = 2, ORDER_DRAIN = 4 };

/* A listening socket of an ingress. All loops wait on it. */
struct gate {
    atomic_uint refs;
    int fd;
    uint16_t port;
    struct gate *next;
};

/* In one loop. In epoll its pointer is marked by GATE_MARK. */
struct opened {
    struct gate *gate;
    bool closed; /* to be freed at the end of the round: there may be an event of it yet */
    struct opened *next;
};

enum { GATE_MARK = 1 };

struct letter {
    enum { LETTER_ANSWER, LETTER_PLACE, LETTER_DECISION, LETTER_OPEN, LETTER_CLOSE, LETTER_PART } kind;
    struct letter *next;
    uint64_t token;
    bool allow; /* a request that is held */
    unsigned n;
    struct addr addresses[MAX_ADDRESSES];
    bool exists;
    struct gate *gate; /* holds it */
    char instance[INSTANCE_NAME_MAX];
};

struct question {
    struct question *next;
    unsigned loop;
    uint64_t token;
    char instance[INSTANCE_MAX]; /* who asks: look-ups are shared fairly among instances */
    char name[HOST_MAX];
};

struct asked {
    struct asked *next;
    struct approval a;
};

struct engine {
    struct table table;
    struct table clients; /* of ingresses, by address */
    struct sites sites;
    struct certs certs;
    atomic_uint_fast64_t generations[PLACE_SLOTS]; /* of what is known about instances, see front.c */
    pthread_mutex_t place_lock;
    struct place places[PLACE_SLOTS];
    struct gate *gates; /* touched by the program's thread only */
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

void loop_send(struct loop *l, struct letter *a); /* takes over a */
void loop_order(struct loop *l, unsigned orders);
uint64_t engine_ask_approval(struct engine *e, const struct approval *a); /* the decision comes to held_decided */
void gate_release(struct gate *g);
/* front.c */
void front_accept(struct loop *l, const struct gate *g);
void front_forget(struct engine *e, const char *name);
void front_forget_all(struct engine *e);
/* Asks the resolver or, with an empty name, where the instance is; the answer
 * comes to up_answer or up_place with the returned token. 0: there is no memory. */
uint64_t engine_ask(struct engine *e, unsigned loop, const char *instance, const char *name);

#endif
