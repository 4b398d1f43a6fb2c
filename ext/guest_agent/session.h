/* Sessions: each is one child process whose standard files travel over the channel.
 *
 * Programs (exec) and workers (stat, copy, …) look the same from here: a pid, up to three descriptors and
 * an exit status. What a session may send is limited by the host's credits, what it may receive by ours, so
 * a slow one never holds up another and no buffer grows. After the child has ended, what it had written is
 * still delivered, then FRAME_EXIT frees the slot.
 *
 * A kept program (protocol.h) outlives its connection: what it wrote and the client may not have is in `kept`, and
 * without a connection it waits in its slot, detached, until it is resumed, its time is over, or the slot is needed.
 */
#ifndef HM_SESSION_H
#define HM_SESSION_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "channel.h"
#include "program.h"

/* Output as it was sent, until it is granted: records of u8 frame type, u32 length, bytes. */
struct kept {
    uint8_t key[KEY_BYTES];
    uint8_t *records;
    size_t end;
    size_t resend;     /* where the next record begins that must be sent again; `end`: none */
    uint64_t granted;  /* bytes of output that the client has */
    bool exit_sent;    /* FRAME_EXIT was sent */
    bool resumed_sent; /* FRAME_RESUMED was sent, or need not be */
    bool tell_sent;    /* FRAME_RESUMED has TAG_SENT */
    int64_t detached;  /* since when there is no connection; 0: there is one */
};

struct session {
    uint32_t id; /* 0: free slot; of a detached one, of its last connection */
    bool is_program, tty;
    bool reaped, timed_out, refused;
    bool is_main; /* the instance's own program (MAIN_KEY): its output is also in the log */
    bool stays;   /* detached, as long as it likes */
    int status;   /* of the child, as waitpid gave it; or the code to report if there was none */
    struct child child;
    uint32_t credit;    /* bytes that we may still send */
    uint32_t allowance; /* bytes that the host may still send */
    uint32_t consumed;  /* bytes to grant again */
    uint8_t *input;     /* WINDOW bytes, allocated when the child is slower than the host */
    size_t input_begin, input_end;
    bool input_ends, input_got_end;
    uint8_t *request; /* an OPEN of several frames, while it arrives */
    size_t request_length;
    uint64_t received; /* bytes of input that the host has sent */
    int64_t deadline;  /* 0: none */
    struct kept *kept; /* NULL: ends with its connection */
    char message[256];
};

/* How long a detached program is kept. */
extern int64_t keep_ms;

struct session *session_find(uint32_t id);
/* A slot for a new id, or NULL. If none is free, the longest detached session is dropped. */
struct session *session_new(uint32_t id);
/* Ends its program and frees the slot; nothing is reported. */
void session_drop(struct session *session);
/* The connection has ended: drops all but the kept ones, which are detached. */
void sessions_lost(void);

/* Keeps what runs in a session beyond its connection. False without memory for it. */
bool session_keep(struct session *session, const uint8_t *key);
void session_detach(struct session *session, bool stays);
/* Programs that nobody has come back to are not ended for that: the machine is another one, or was stopped for long. */
void sessions_stay(void);
/* The kept session with that key continues under the id of `opened`, whose slot is freed. `received`: the bytes of
 * output that the client has; UINT64_MAX: it wants what follows. False if there is none, or none that can have sent so much. */
bool session_resume(struct session *opened, const uint8_t *key, uint64_t received);
/* The host's client has received `count` more bytes. False if fewer were sent. */
bool session_granted(struct session *session, uint32_t count);

void session_started(struct session *session, const struct child *child, bool is_program, bool tty, int64_t timeout_ms);
/* Without a child: reports `code` and the message as the session's exit. */
void session_refuse(struct session *session, int code, const char *message);

/* Input from the host for the child. False if it is more than was granted. */
bool session_input(struct session *session, const uint8_t *data, size_t length, bool end);
void session_signal(struct session *session, int signal);
void session_resize(struct session *session, uint16_t rows, uint16_t cols);
/* True if the pid was a session's. */
bool session_reap(pid_t pid, int status);

/* Sends grants and exits that are due, and handles timeouts. */
void sessions_step(struct channel *channel);
/* Adds what sessions wait for; sessions_io finds it again by position. Returns the new count. */
size_t sessions_poll(struct channel *channel, struct pollfd *fds, size_t count);
void sessions_io(struct channel *channel, const struct pollfd *fds, size_t count);
/* Milliseconds to the next timeout, -1 for none. */
int sessions_timeout(struct channel *channel);
/* Sessions with a connection whose exit has not been sent. */
size_t sessions_count(void);

#define SESSION_POLL_FDS (3 * MAX_SESSIONS)

#endif
