/* The data of connections and loops: what the parts of the data plane share. No functions but the smallest. */
#ifndef HYPEMAN_EGRESS_CONN_H
#define HYPEMAN_EGRESS_CONN_H

#include <nghttp2/nghttp2.h>
#include <openssl/ssl.h>
#include <sys/types.h>

#include "engine.h"
#include "mint.h"
#include "site.h"
#include "verdict.h"

enum {
    RECORD = 16384,                 /* largest TLS record */
    WINDOW = 1024 * 1024,           /* what a peer of HTTP/2 may send of all streams before it is taken on */
    WINDOW_BEYOND = WINDOW - 65535, /* the protocol's default */
    WATERMARK = 64 * 1024,          /* stop reading the peer above; 64 KB beat 256 KB by 6-25 % (L2) */
    SCRATCH = 160 * 1024,
    POOL_SLOTS = 256,
    POOL_PER_KEY = 128, /* idle connections to one host */
    POOL_IDLE = 1024,   /* idle connections of a loop */
    ASKED_SLOTS = 1024,
    MAX_ADDRESSES = 16,
    T_TURN = T_CLASSES, /* the timer of what gives others a turn before it goes on */
    MAX_INTERIM = 64,   /* 1xx responses before the one that counts */
    PLACE_SLOTS = 1024, /* generations of what is known about instances, see front.c */
};

struct buf {
    char *p;
    size_t off, len, cap; /* live bytes are p[off..len) */
};

enum kind { DOWN, UP };

enum phase {
    P_DETECT,    /* down: first byte */
    P_HELLO,     /* down: TLS, collecting the ClientHello */
    P_WAIT_PASS, /* down: passing through, waiting for the host */
    P_RESOLVE,   /* up: waiting for addresses */
    P_CONNECT,   /* up: TCP */
    P_HANDSHAKE, /* TLS, both sides */
    P_HTTP1,
    P_HTTP2,
    P_POSTGRES_TLS, /* up: the host says whether it begins TLS */
    P_POSTGRES,     /* until the login is complete; then P_TUNNEL */
    P_MYSQL,        /* the same */
    P_TUNNEL,       /* after 101: bytes, sealed on both sides */
    P_SPLICE,       /* passed through */
    P_LINGER,       /* everything said; reading until the peer is done */
};

enum step { STEP_AGAIN, STEP_MORE, STEP_STOP };

struct loop;
struct conn;

struct timer {
    struct conn *prev, *next;
    int64_t due_ms;
    int8_t class; /* -1: off */
};

/* A header block of HTTP/2, gathered field by field. */
struct fields {
    struct head *head;
    struct buf text;
    struct str host;
    bool plain; /* the request came without TLS */
    bool done;
};

/* What only a request by an ingress has. */
struct visit {
    const struct route *route; /* holds its site */
    struct host host;          /* that the client asked for */
    bool html;                 /* it understands our pages in HTML */
    char *location;            /* where it is redirected to */
    char *proof;               /* what a public CA wants to read */
    uint8_t path_n;
    char path[200]; /* without the query */
};

struct echo;
struct postgres;
struct mysql;

/* Where an instance is, as the server said. */
struct place {
    char name[INSTANCE_NAME_MAX];
    uint64_t generation;
    struct addr address;
};

/* One request and its response. Embedded in a HTTP/1 down conn, allocated per stream in HTTP/2. */
struct xchg {
    struct conn *down, *up;
    struct conn *awaits;            /* the connection that is being opened for it */
    int32_t down_stream, up_stream; /* HTTP/2 */
    struct destination to;
    struct visit *visit;
    struct echo *echo; /* what is taken out of the response, see echo.c */
    size_t surplus;    /* HTTP/2: bytes of to_down beyond those that the host's window counts */
    bool active;
    bool waiting;   /* for an upstream connection, or held */
    bool held;      /* until its credential has a value, or `held_until_ms` */
    bool gathering; /* its body must be complete before the head is written */
    bool gathered;  /* and is, in to_up */
    bool granted;   /* HTTP/2: for what is in to_up the client has been granted window already */
    bool is_head, upgrade, tunnel;
    bool req_done;         /* all of the request was read from the client */
    bool req_complete;     /* nothing of it is left unread */
    bool old_client;       /* HTTP/1.0 */
    bool matched_trailers; /* a credential was added: request trailers are dropped */
    bool in_trailers;      /* HTTP/1 down: behind the last chunk */
    bool half;             /* the client has ended its side */
    bool passed;           /* audit: carried without looking */
    bool asked;            /* for an approval: `approval` is the question's token */
    bool approved;         /* by somebody, for the rule `asked_rule` */
    bool resp_started, resp_done;
    unsigned interim; /* 1xx responses so far */
    bool reused, retried, retriable;
    bool counted;      /* among its instance's streams */
    bool taken;        /* HTTP/2: of the body, which is then not here any more */
    bool closing;      /* HTTP/1 down: no further request on this connection */
    bool down_chunked; /* HTTP/1 down: how the response body is framed */
    enum body req_body;
    uint64_t req_left;
    struct h1_chunked req_chunks;
    struct buf head;  /* HTTP/1 down: kept while the body behind it is gathered */
    size_t kept_head; /* HTTP/1 down: bytes of the head kept at the front of `in` for a retry */
    /* audit */
    int64_t held_until_ms;
    int64_t started_us;
    uint64_t up_bytes, down_bytes;
    int status;
    enum reason reason;
    uint8_t injected;
    char method[17];
    char keys[96];
    struct ruled ruled;
    uint64_t approval;
    enum reason held_for;
    char asked_rule[ACCESS_NAME_MAX + 1];
    /* HTTP/2 */
    struct fields request, response, up_trailers, down_trailers;
    struct buf to_up, to_down; /* body bytes waiting for the other side to take them */
    bool to_down_end, to_up_deferred, to_down_deferred;
    bool reset_by_us;               /* not because of what the client did */
    bool bad;                       /* the request's header block is not acceptable */
    uint32_t reset_code;            /* with which the host ended the stream; REFUSED_STREAM: it has not looked at it */
    size_t unconsumed_down;         /* taken by the host, not yet granted back to the client */
    struct xchg *prev, *next;       /* streams of the down conn */
    struct xchg *up_prev, *up_next; /* waiting for, or streams of, the up conn */
};

/* What a connection does with its end of an exchange: one table each for the guest's and the host's side in HTTP/1 and
 * HTTP/2, so that what joins them (xchg.c, pool.c) need not know the version. Set when the protocol is known. */
struct side {
    /* the guest's side: the response goes down */
    void (*head)(struct xchg *x, const struct head *h, enum body body, uint64_t length);
    void (*fail)(struct xchg *x, enum reason why, const char *detail, bool told);
    void (*finished)(struct xchg *x);
    void (*again)(struct xchg *x); /* the request goes to another connection */
    bool (*full)(struct xchg *x);  /* the caller stops, and is woken when there is room */
    /* the host's side: the exchange leaves its connection */
    void (*abandon)(struct conn *c, struct xchg *x); /* in the middle */
    void (*release)(struct conn *c, struct xchg *x); /* complete */
    /* both: bytes of the body, its end, and what the other side may do now */
    void (*data)(struct xchg *x, const char *p, size_t n);
    void (*end)(struct xchg *x, const struct head *trailers);
    void (*resume)(struct xchg *x);
    void (*pump)(struct conn *c); /* the connection has room again */
    void (*lost)(struct conn *c); /* the connection is over: so are its exchanges */
};

extern const struct side DOWN1, DOWN2, UP1, UP2;

struct conn {
    struct loop *loop;
    const struct side *side;
    void (*killed)(struct conn *c); /* called once: the parts above io forget it */
    SSL *ssl;
    int fd;
    enum kind kind;
    bool front; /* of an ingress: from a client, or to a guest */
    enum phase phase;
    bool readable_end; /* the kernel said RDHUP: read on to the end */
    bool hung_up;      /* HUP or ERR */
    bool drained;      /* the last recv was short: nothing there until the next edge */
    bool sock_eof;     /* recv said 0 */
    bool clean_eof;    /* and TLS said so too */
    bool blocked;      /* the last send was short */
    bool dead, broken, dirty, again;
    bool counted;     /* among its instance's connections, see conn_count */
    bool shaking;     /* among its handshakes */
    bool windowed;    /* among its windows */
    bool waited;      /* somebody stopped reading because there was no room here */
    bool roomy;       /* and there is again */
    bool close_after; /* close once everything is sent */
    bool shut_after;  /* half-close once everything is sent */
    bool shut_done;
    struct buf in;     /* received, opened, not consumed */
    struct buf out;    /* to be sent, sealed */
    struct buf stage;  /* to be sealed */
    struct buf prefix; /* what TLS must read before the socket: the ClientHello */
    struct conn *next_dirty, *next_again, *next_dead;
    struct conn *all_prev, *all_next;
    struct timer timer;
    struct conn *peer; /* tunnel and splice */
    int pipe[2];       /* splice: from this conn's socket to the peer's */
    size_t piped;
    bool spoke_tls;        /* splice, up: the host answered the ClientHello */
    struct destination to; /* down: what the client asked for; up: where it leads */
    nghttp2_session *h2;
    struct xchg *streams; /* HTTP/2: of this conn */
    unsigned stream_count;
    bool in_h2;  /* inside nghttp2: do not re-enter */
    bool goaway; /* sent (down) or received (up): no new streams */

    /* down */
    struct tenant *tenant;
    struct addr source;
    struct xchg x;
    struct postgres *pg;   /* a login to Postgres, see postgres.h */
    struct mysql *my;      /* a login to MySQL, see mysql.h */
    bool explicit_proxy;   /* not redirected: the client spoke to the proxy's own address */
    struct conn *passing;  /* the connection that is being opened to pass it through */
    bool connected;        /* a CONNECT was answered; `to` is bound */
    bool pass_refused;     /* no connection could be opened to pass it through */
    struct ruled looked;   /* what the rules say of the connection, if it is passed through */
    bool names_only;       /* TLS without a server name is not passed through */
    uint32_t hello_size;   /* of the ClientHello at the front of `in` */
    uint16_t dialled_port; /* redirected: original destination; of an ingress: where it listens */
    struct addr dialled;
    enum reason refused; /* every request on this connection is answered with it */
    bool validated;      /* a public CA looks at the certificate of a name, see certs.h */
    bool prefers_h1;     /* HTTP/2 only if the client offers nothing else */
    unsigned resets;     /* streams the client cancelled since `resets_since` */
    int64_t resets_since;
    enum { H1_HEAD, H1_BODY, H1_WAIT } h1;
    bool head_timer;

    /* up */
    struct xchg *one;      /* HTTP/1: the exchange it carries */
    struct xchg *waiting;  /* HTTP/2 wanted: exchanges waiting for the handshake */
    struct conn *pass_for; /* pass through: the down conn that waits */
    uint64_t generation;
    bool timed_out;
    bool want_h2, served, keep;
    bool certified; /* the host was shown a certificate of the rules' generation */
    bool spent;     /* a body on it may not have been read to its end: nothing else may follow */
    bool h1_only;   /* HTTP/2 was offered and the host chose HTTP/1 */
    uint64_t token; /* of the resolver's question */
    struct conn *ask_prev, *ask_next;
    bool asking;
    unsigned pool_depth; /* idle connections to this host below this one, or fewer */
    unsigned addresses, address;
    struct addr candidates[MAX_ADDRESSES];
    enum { R1_HEAD, R1_LENGTH, R1_CHUNKED, R1_TRAILERS, R1_CLOSE } r1;
    uint64_t resp_left;
    struct h1_chunked resp_chunks;
    struct conn *pool_prev, *pool_next;
    bool pooled, idle;
    char detail[128];
};

struct loop {
    struct engine *engine;
    const unsigned *timers_ms; /* the engine's */
    int64_t bytes_share;       /* that the loop may have in buffers */
    unsigned index;
    int epoll, wake, listener;
    struct opened *opened, *closed; /* listeners of ingresses */
    int reserve;                    /* a descriptor to give up when there are no more, see accept.c */
    pthread_t thread;
    bool draining;
    int64_t now_us, now_ms, now_s, drain_by_ms;
    struct mint *mint;
    struct conn *dirty, *again, *graveyard, *all;
    unsigned connections;
    struct {
        struct conn *first, *last;
    } timers[T_CLASSES + 1];
    struct conn *pool[POOL_SLOTS];
    struct audit *audit;
    int64_t audit_due_ms;
    uint64_t counters[M_COUNT];
    uint64_t latency[LATENCY_BUCKETS];
    uint64_t denied[R_COUNT];
    pthread_mutex_t inbox_lock;
    struct letter *inbox, *inbox_last;
    atomic_uint orders;
    struct conn *asked[ASKED_SLOTS]; /* waiting for addresses, by token */
    unsigned idle;                   /* connections to hosts that are kept for reuse */
    struct tenant *payer;            /* whose buffers are being filled, see io.c */
    int64_t bytes;                   /* in buffers */
    uint64_t limited[B_COUNT];       /* refused because of a bound */
    struct buf *spare;               /* free list by size class, see io.c */
    unsigned spare_n[4];
    void *spares[4];
    char *scratch;
    char *room;          /* for what a request is given by its rules, see transform.h */
    unsigned held;       /* exchanges that are held, or more */
    int64_t held_due_ms; /* when the first of them is not held any longer */
    struct head head;    /* of the message being handled right now */
};

static inline size_t buf_size(const struct buf *b)
{
    return b->len - b->off;
}

#endif
