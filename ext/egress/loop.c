/* One thread, one epoll: handles events, then the work that follows from them until none is left, then timers. */
#define _GNU_SOURCE
#include "loop.h"

#include <errno.h>
#include <openssl/crypto.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

enum { EVENTS = 256 };

static void update_clock(struct loop *l)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    l->now_us = (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
    l->now_ms = l->now_us / 1000;
    (void)clock_gettime(CLOCK_REALTIME_COARSE, &t);
    l->now_s = t.tv_sec;
}

static void run(struct conn *c)
{
    if (c->broken || (c->hung_up && c->phase == P_LINGER)) {
        conn_lost(c);
        return;
    }
    if (c->roomy) {
        c->roomy = false;
        conn_drained(c);
    }
    if (c->dead)
        return;
    if (c->kind == DOWN)
        down_run(c);
    else
        up_run(c);
}

void conn_run(struct conn *c)
{
    if (c->dead)
        return;
    struct tenant *before = c->loop->payer;
    c->loop->payer = c->tenant;
    run(c);
    c->loop->payer = before;
}

static void on_event(struct conn *c, uint32_t events)
{
    if (c->dead)
        return;
    if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        c->drained = false;
    if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        c->readable_end = true;
    if (events & (EPOLLHUP | EPOLLERR))
        c->hung_up = true;
    if (c->phase == P_CONNECT) {
        if (events & (EPOLLOUT | EPOLLHUP | EPOLLERR))
            up_connected(c);
        return;
    }
    if (events & EPOLLOUT && c->blocked) {
        c->blocked = false;
        conn_flush(c);
        if (c->dead)
            return;
        if (c->phase == P_SPLICE)
            conn_again(c);
    }
    if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        conn_run(c);
}

static void handle_gate(struct loop *l, uint64_t marked)
{
    const struct opened *o = (const struct opened *)(uintptr_t)(marked & ~(uint64_t)GATE_MARK);
    if (!o->closed)
        front_accept(l, o->gate);
}

static void handle(struct conn *c, uint32_t events)
{
    c->loop->payer = c->tenant;
    on_event(c, events);
    c->loop->payer = NULL;
}

/* Flushing and running wake each other; both lists end because data ends or a watermark is reached. */
static void run_until_idle(struct loop *l)
{
    while (l->dirty || l->again) {
        struct conn *c = l->dirty;
        l->dirty = NULL;
        while (c) {
            struct conn *next = c->next_dirty;
            c->dirty = false;
            conn_flush(c);
            c = next;
        }
        c = l->again;
        l->again = NULL;
        while (c) {
            struct conn *next = c->next_again;
            c->again = false;
            conn_run(c);
            c = next;
        }
    }
}

/* Whether output may wait for more of its kind: small answers of several hosts on one HTTP/2 connection then leave in
 * one record, at three quarters of the cost. Large ones should leave while they are in the cache. */
static bool may_gather(const struct loop *l)
{
    return (!l->again || l->again->h2) && (!l->dirty || buf_size(&l->dirty->out) < RECORD);
}

static void free_dead(struct loop *l)
{
    while (l->closed) {
        struct opened *next = l->closed->next;
        free(l->closed);
        l->closed = next;
    }
    while (l->graveyard) {
        struct conn *c = l->graveyard;
        l->graveyard = c->next_dead;
        if (c->h2)
            nghttp2_session_del(c->h2);
        SSL_free(c->ssl);
        buf_free(l, &c->in);
        buf_free(l, &c->out);
        buf_free(l, &c->stage);
        buf_free(l, &c->prefix);
        buf_free(l, &c->x.to_up);
        buf_free(l, &c->x.head);
        if (c->tenant)
            tenant_release(c->tenant);
        free(c);
    }
}

static void on_timer(struct conn *c, int class)
{
    conn_timer(c, -1);
    switch (class) {
    case T_CONNECT:
    case T_DIAL:
        c->timed_out = true;
        up_next_address(c);
        break;
    case T_RESOLVE:
        up_failed(c, R_RESOLVE, "no answer in time");
        break;
    case T_PLACE:
        up_failed(c, R_NOT_RUNNING, NULL);
        break;
    case T_HANDSHAKE:
        if (c->kind == UP)
            up_failed(c, R_CONNECT_TIMEOUT, "no handshake in time");
        else if (c->phase == P_SPLICE)
            splice_unanswered(c);
        else
            conn_lost(c);
        break;
    case T_TURN:
        conn_again(c);
        break;
    case T_HEAD:
        if (c->kind == DOWN && c->phase == P_HTTP1 && c->h1 == H1_HEAD) {
            xchg_begin(&c->x, c, NULL);
            c->x.closing = true;
            down_fail(&c->x, R_CLIENT_TIMEOUT, NULL);
        } else {
            conn_lost(c);
        }
        break;
    case T_STREAM:
    case T_HALF:
    case T_ANSWER:
        if (c->kind == UP && (c->one || c->streams)) {
            /* A guest that has room for more of the request waits for the client. */
            bool client = c->front && c->one && !c->one->req_complete && conn_room(c);
            up_failed(c, client ? R_CLIENT_TIMEOUT : R_UPSTREAM_TIMEOUT, NULL);
        } else {
            conn_lost(c);
        }
        break;
    default:
        conn_lost(c);
        break;
    }
}

/* Milliseconds until the next timer, expiring those that are due. */
static int run_timers(struct loop *l)
{
    int64_t next = l->now_ms + 60000;
    for (int k = 0; k <= T_TURN; k++) {
        struct conn *c;
        while ((c = l->timers[k].first) && c->timer.due_ms <= l->now_ms) {
            l->payer = c->tenant;
            on_timer(c, k);
            l->payer = NULL;
            run_until_idle(l);
        }
        if (c && c->timer.due_ms < next)
            next = c->timer.due_ms;
    }
    if (l->held) {
        if (l->held_due_ms <= l->now_ms)
            held_again(l, false);
        run_until_idle(l);
        if (l->held && l->held_due_ms < next)
            next = l->held_due_ms;
    }
    if (l->audit_due_ms && l->audit_due_ms < next)
        next = l->audit_due_ms;
    if (l->draining && l->drain_by_ms < next)
        next = l->drain_by_ms;
    return next <= l->now_ms ? 0 : (int)(next - l->now_ms);
}

static void wake(struct loop *l)
{
    uint64_t one = 1;
    (void)!write(l->wake, &one, sizeof one);
}

void loop_send(struct loop *l, struct letter *a)
{
    (void)pthread_mutex_lock(&l->inbox_lock);
    a->next = NULL;
    *(l->inbox ? &l->inbox_last->next : &l->inbox) = a;
    l->inbox_last = a;
    (void)pthread_mutex_unlock(&l->inbox_lock);
    wake(l);
}

void loop_order(struct loop *l, unsigned orders)
{
    atomic_fetch_or(&l->orders, orders);
    wake(l);
}

static void begin_accept(struct loop *l)
{
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = &l->listener};
    if (l->listener >= 0)
        (void)epoll_ctl(l->epoll, EPOLL_CTL_MOD, l->listener, &e);
}

/* Others hold the socket too, so that closing it alone would not take it out of epoll. */
static void close_listener(struct loop *l)
{
    if (l->listener >= 0) {
        (void)epoll_ctl(l->epoll, EPOLL_CTL_DEL, l->listener, NULL);
        (void)close(l->listener);
    }
    l->listener = -1;
}

void gate_release(struct gate *g)
{
    if (atomic_fetch_sub(&g->refs, 1) == 1) {
        (void)close(g->fd);
        free(g);
    }
}

static void open_gate(struct loop *l, struct gate *g)
{
    struct opened *o = l->draining ? NULL : calloc(1, sizeof *o);
    /* All loops wait on one socket: the kernel wakes one of them for each connection. */
    struct epoll_event e = {.events = EPOLLIN | EPOLLEXCLUSIVE, .data.u64 = (uint64_t)(uintptr_t)o | GATE_MARK};
    if (!o || epoll_ctl(l->epoll, EPOLL_CTL_ADD, g->fd, &e) != 0) {
        free(o);
        gate_release(g);
        return;
    }
    o->gate = g;
    o->next = l->opened;
    l->opened = o;
}

static void close_gate(struct loop *l, struct opened **at)
{
    struct opened *o = *at;
    (void)epoll_ctl(l->epoll, EPOLL_CTL_DEL, o->gate->fd, NULL);
    gate_release(o->gate);
    o->closed = true;
    *at = o->next;
    o->next = l->closed;
    l->closed = o;
}

static void find_and_close(struct loop *l, const struct gate *g)
{
    for (struct opened **at = &l->opened; *at; at = &(*at)->next)
        if ((*at)->gate == g) {
            close_gate(l, at);
            return;
        }
}

/* Idle connections are closed at once, the others when their exchanges have ended. */
static void begin_drain(struct loop *l, unsigned grace_ms)
{
    l->draining = true;
    l->drain_by_ms = l->now_ms + grace_ms;
    close_listener(l);
    while (l->opened)
        close_gate(l, &l->opened);
    struct conn *next;
    for (struct conn *c = l->all; c; c = next) {
        next = c->all_next;
        if (c->dead)
            continue;
        if (c->kind == UP && c->pooled && c->phase == P_HTTP1)
            conn_kill(c);
        else if (c->kind == DOWN && c->phase == P_HTTP1 && c->h1 == H1_HEAD && !c->x.active && !buf_size(&c->in))
            conn_finish(c, false);
        else if (c->kind == DOWN && c->h2)
            c->side->pump(c);
        else if (c->kind == UP && c->phase == P_HTTP2 && !c->streams)
            conn_kill(c);
    }
    run_until_idle(l);
}

static void read_inbox(struct loop *l)
{
    uint64_t count;
    (void)!read(l->wake, &count, sizeof count);
    unsigned orders = atomic_exchange(&l->orders, 0);
    (void)pthread_mutex_lock(&l->inbox_lock);
    struct letter *a = l->inbox;
    l->inbox = NULL;
    (void)pthread_mutex_unlock(&l->inbox_lock);
    if (orders & ORDER_SWEEP) {
        up_sweep(l);
        held_again(l, true);
    }
    if (orders & ORDER_ACCEPT)
        begin_accept(l);
    if (orders & ORDER_DRAIN)
        begin_drain(l, atomic_load(&l->engine->grace_ms));
    while (a) {
        struct letter *next = a->next;
        switch (a->kind) {
        case LETTER_ANSWER:
            up_answer(l, a->token, a->n, a->addresses);
            break;
        case LETTER_PLACE:
            up_place(l, a->token, a->n, a->addresses[0], a->exists);
            break;
        case LETTER_DECISION:
            held_decided(l, a->token, a->allow);
            break;
        case LETTER_OPEN:
            open_gate(l, a->gate);
            break;
        case LETTER_CLOSE:
            find_and_close(l, a->gate);
            gate_release(a->gate);
            break;
        case LETTER_PART:
            up_part(l, a->instance);
            break;
        }
        run_until_idle(l);
        free(a);
        a = next;
    }
    run_until_idle(l);
}

static void end_all(struct loop *l)
{
    while (l->all) {
        struct conn *c = l->all;
        conn_lost(c);
        conn_kill(c);
    }
    l->dirty = l->again = NULL;
    while (l->opened)
        close_gate(l, &l->opened);
    free_dead(l);
}

void *loop_main(void *arg)
{
    struct loop *l = arg;
    struct epoll_event events[EVENTS];
    int wait = 0;
    for (;;) {
        int n = epoll_wait(l->epoll, events, EVENTS, wait);
        update_clock(l);
        for (int i = 0; i < n; i++) {
            void *who = events[i].data.ptr;
            if (who == &l->listener)
                accept_all(l);
            else if (who == &l->wake)
                read_inbox(l);
            else if (events[i].data.u64 & GATE_MARK)
                handle_gate(l, events[i].data.u64);
            else
                handle(who, events[i].events);
            if (!may_gather(l))
                run_until_idle(l);
        }
        run_until_idle(l);
        wait = run_timers(l);
        free_dead(l);
        if (l->audit_due_ms && l->audit_due_ms <= l->now_ms)
            audit_tick(l);
        if (l->draining && (!l->connections || l->now_ms >= l->drain_by_ms))
            break;
    }
    end_all(l);
    atomic_fetch_sub(&l->engine->running, 1);
    audit_tick(l);
    return NULL;
}
