#define _GNU_SOURCE
#include "session.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "bytes.h"
#include "fields.h"
#include "util.h"
#include "workload.h"

/* Granting in small amounts would cost a frame each; in one piece it would stall the stream. */
#define GRANT_BYTES (WINDOW / 4)
#define TERMINAL_EOF "\x04"
#define RECORD_HEADER 5
/* Extra space for the headers of small records; when there is no room for another record, output waits. */
#define RECORDS_BYTES (KEPT_BYTES + KEPT_BYTES / 4)

int64_t keep_ms = KEEP_MS;
static struct session sessions[MAX_SESSIONS];
/* Which session is served first; moves on, so that a busy one cannot starve those behind it. */
static size_t turn;

/* Who polled which descriptor in this round. */
static struct poller {
    struct session *session;
    enum role { ROLE_IN, ROLE_OUT, ROLE_ERR } role;
} pollers[SESSION_POLL_FDS];

static bool is_detached(const struct session *session)
{
    return session->kept && session->kept->detached;
}

/* What it prints goes to the log alone: nobody is there, and nobody can come back to a machine that ends. */
static bool spills(const struct session *session)
{
    return session->is_main && is_detached(session) && (session->stays || session->reaped);
}

static bool is_open(const struct session *session)
{
    return session->child.out >= 0 || session->child.err >= 0;
}

struct session *session_find(uint32_t id)
{
    for (size_t i = 0; id && i < MAX_SESSIONS; i++)
        if (sessions[i].id == id && !is_detached(&sessions[i]))
            return &sessions[i];
    return NULL;
}

size_t sessions_count(void)
{
    size_t count = 0;
    for (size_t i = 0; i < MAX_SESSIONS; i++)
        count += spills(&sessions[i]) && is_open(&sessions[i]);
    for (size_t i = 0; i < MAX_SESSIONS; i++)
        count += sessions[i].id && !is_detached(&sessions[i]) && !(sessions[i].kept && sessions[i].kept->exit_sent);
    return count;
}

struct session *session_new(uint32_t id)
{
    struct session *found = NULL;
    for (size_t i = 0; i < MAX_SESSIONS; i++) {
        struct session *session = &sessions[i];
        if (!session->id) {
            found = session;
            break;
        }
        if (is_detached(session) && !session->is_main && (!found || session->kept->detached < found->kept->detached))
            found = session;
    }
    if (!found)
        return NULL;
    if (found->id) /* the host does not count detached sessions */
        session_drop(found);
    *found = (struct session){.id = id, .child = {0, -1, -1, -1, -1}, .credit = WINDOW, .allowance = WINDOW};
    return found;
}

static void free_session(struct session *session)
{
    close_fd(&session->child.in);
    close_fd(&session->child.out);
    close_fd(&session->child.err);
    close_fd(&session->child.failure);
    free(session->input);
    free(session->request);
    if (session->kept)
        free(session->kept->records);
    free(session->kept);
    *session = (struct session){0};
}

/* Programs are killed with their whole session. A worker gets a signal, then the end of its input, and undoes what it
 * began. */
static void kill_child(struct session *session)
{
    if (!session->child.pid || session->reaped)
        return;
    if (session->is_program)
        kill_session(session->child.pid);
    else
        kill(session->child.pid, SIGTERM);
}

void session_drop(struct session *session)
{
    kill_child(session);
    free_session(session);
}

void sessions_lost(void)
{
    for (size_t i = 0; i < MAX_SESSIONS; i++) {
        if (!sessions[i].id)
            continue;
        if (sessions[i].kept)
            session_detach(&sessions[i], false);
        else
            session_drop(&sessions[i]);
    }
}

bool session_keep(struct session *session, const uint8_t *key)
{
    struct kept *kept = calloc(1, sizeof *kept);
    if (!kept || !(kept->records = malloc(RECORDS_BYTES))) {
        free(kept);
        return false;
    }
    memcpy(kept->key, key, KEY_BYTES);
    kept->resumed_sent = true;
    session->kept = kept;
    session->is_main = memcmp(key, MAIN_KEY, KEY_BYTES) == 0;
    session->credit = KEPT_BYTES;
    return true;
}

void session_detach(struct session *session, bool stays)
{
    if (session->kept && !session->kept->detached)
        session->kept->detached = now_ms();
    session->stays |= stays && session->is_main;
}

void sessions_stay(void)
{
    for (size_t i = 0; i < MAX_SESSIONS; i++)
        sessions[i].stays |= sessions[i].is_main && is_detached(&sessions[i]);
}

static void copy_record_header(uint8_t *at, uint8_t type, size_t length)
{
    at[0] = type;
    put_u32(at + 1, (uint32_t)length);
}

/* Bytes that a new record can hold. */
static size_t room_to_keep(const struct kept *kept)
{
    size_t left = RECORDS_BYTES - kept->end;
    return left > RECORD_HEADER ? left - RECORD_HEADER : 0;
}

static void keep_output(struct kept *kept, uint8_t type, const uint8_t *data, size_t length)
{
    copy_record_header(kept->records + kept->end, type, length);
    memcpy(kept->records + kept->end + RECORD_HEADER, data, length);
    kept->end += RECORD_HEADER + length;
    kept->resend = kept->end;
}

/* Bytes of output in the records before `end`. */
static size_t kept_bytes(const struct kept *kept, size_t end)
{
    size_t bytes = 0;
    for (size_t at = 0; at < end; at += RECORD_HEADER + get_u32(kept->records + at + 1))
        bytes += get_u32(kept->records + at + 1);
    return bytes;
}

/* Drops the first `count` bytes; there are at least as many. */
static void forget_output(struct kept *kept, size_t count)
{
    size_t at = 0;
    kept->granted += count;
    while (at < kept->end && count >= get_u32(kept->records + at + 1)) {
        count -= get_u32(kept->records + at + 1);
        at += RECORD_HEADER + get_u32(kept->records + at + 1);
    }
    if (count > 0) { /* the rest of the record gets a header in place of dropped bytes */
        uint8_t type = kept->records[at];
        size_t left = get_u32(kept->records + at + 1) - count;
        at += count;
        copy_record_header(kept->records + at, type, left);
    }
    memmove(kept->records, kept->records + at, kept->end - at);
    kept->end -= at;
    kept->resend = kept->resend > at ? kept->resend - at : 0;
}

bool session_granted(struct session *session, uint32_t count)
{
    struct kept *kept = session->kept;
    if (kept ? count > kept_bytes(kept, kept->resend) : session->credit > UINT32_MAX - count)
        return false;
    if (kept)
        forget_output(kept, count);
    session->credit += count;
    return true;
}

bool session_resume(struct session *opened, const uint8_t *key, uint64_t received)
{
    for (size_t i = 0; i < MAX_SESSIONS; i++) {
        struct session *session = &sessions[i];
        struct kept *kept = session->kept;
        if (!kept || memcmp(kept->key, key, KEY_BYTES) != 0)
            continue;
        bool from_now = received == UINT64_MAX;
        if (from_now)
            received = kept->granted + kept_bytes(kept, kept->end);
        if (received < kept->granted || received - kept->granted > kept_bytes(kept, kept->end))
            return false;
        uint32_t id = opened->id;
        free_session(opened);
        forget_output(kept, received - kept->granted);
        kept->resend = 0;
        kept->exit_sent = false;
        kept->detached = 0;
        kept->resumed_sent = false;
        kept->tell_sent = from_now;
        session->stays = false;
        session->id = id;
        session->credit = (uint32_t)(KEPT_BYTES - kept_bytes(kept, kept->end));
        session->allowance = (uint32_t)(WINDOW - (session->input_end - session->input_begin));
        session->consumed = 0;
        return true;
    }
    return false;
}

void session_started(struct session *session, const struct child *child, bool is_program, bool tty, int64_t timeout_ms)
{
    session->child = *child;
    session->is_program = is_program;
    session->tty = tty;
    session->deadline = timeout_ms > 0 ? now_ms() + timeout_ms : 0;
}

void session_refuse(struct session *session, int code, const char *message)
{
    session->reaped = session->refused = true;
    session->status = code;
    snprintf(session->message, sizeof session->message, "%s", message);
}

/* Writes buffered input to the child; what a child no longer reads is discarded. */
static void push_input(struct session *session)
{
    while (session->input_begin < session->input_end && session->child.in >= 0) {
        size_t waiting = session->input_end - session->input_begin;
        ssize_t n = write(session->child.in, session->input + session->input_begin, waiting);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            return;
        if (n < 0)
            close_fd(&session->child.in);
        if (n > 0) {
            session->input_begin += (size_t)n;
            session->consumed += (uint32_t)n;
        }
    }
    if (session->child.in < 0)
        session->consumed += (uint32_t)(session->input_end - session->input_begin);
    session->input_begin = session->input_end = 0;
    if (!session->input_ends)
        return;
    session->input_ends = false;
    if (!session->tty)
        close_fd(&session->child.in);
    else if (session->child.in >= 0 && write(session->child.in, TERMINAL_EOF, 1) < 0)
        session->input_ends = errno == EAGAIN;
}

bool session_input(struct session *session, const uint8_t *data, size_t length, bool end)
{
    if (length > session->allowance)
        return false;
    session->allowance -= (uint32_t)length;
    session->received += length;
    session->input_got_end |= end;
    if (session->input_begin == session->input_end && session->child.in >= 0) {
        ssize_t n = write(session->child.in, data, length);
        if (n < 0 && errno != EAGAIN && errno != EINTR)
            close_fd(&session->child.in);
        if (n > 0) {
            session->consumed += (uint32_t)n;
            data += n;
            length -= (size_t)n;
        }
    }
    session->input_ends |= end;
    if (length > 0 && session->child.in < 0) {
        session->consumed += (uint32_t)length;
    } else if (length > 0) {
        if (!session->input && !(session->input = malloc(WINDOW))) {
            session_signal(session, SIGKILL);
            return true;
        }
        if (session->input_begin > 0) {
            memmove(session->input, session->input + session->input_begin, session->input_end - session->input_begin);
            session->input_end -= session->input_begin;
            session->input_begin = 0;
        }
        memcpy(session->input + session->input_end, data, length);
        session->input_end += length;
    }
    if (session->input_ends)
        push_input(session);
    return true;
}

void session_signal(struct session *session, int signal)
{
    if (!session->child.pid || session->reaped)
        return;
    /* A child that was just forked leads no group yet. */
    if (kill(-session->child.pid, signal) < 0)
        kill(session->child.pid, signal);
}

void session_resize(struct session *session, uint16_t rows, uint16_t cols)
{
    struct winsize size = {.ws_row = rows, .ws_col = cols};
    if (session->tty && session->child.out >= 0)
        ioctl(session->child.out, TIOCSWINSZ, &size);
}

bool session_reap(pid_t pid, int status)
{
    for (size_t i = 0; i < MAX_SESSIONS; i++) {
        struct session *session = &sessions[i];
        if (!session->id || session->reaped || session->child.pid != pid)
            continue;
        struct start_failure failure;
        session->reaped = true;
        session->status = status;
        if (session->child.failure >= 0 && read(session->child.failure, &failure, sizeof failure) == sizeof failure)
            snprintf(session->message, sizeof session->message, "%s", failure.message);
        close_fd(&session->child.failure);
        close_fd(&session->child.in);
        return true;
    }
    return false;
}

static void put_exit(struct field_writer *writer, const struct session *session)
{
    int code = session->status, signal = 0;
    if (!session->refused) {
        signal = WIFSIGNALED(session->status) ? WTERMSIG(session->status) : 0;
        code = signal ? 128 + signal : WEXITSTATUS(session->status);
    }
    if (session->timed_out)
        code = 124;
    put_u32_field(writer, TAG_EXIT_CODE, (uint32_t)code);
    put_u32_field(writer, TAG_SIGNAL, (uint32_t)signal);
    put_u8_field(writer, TAG_TIMED_OUT, session->timed_out);
    put_text_field(writer, TAG_MESSAGE, session->message);
}

static void send_exit(struct channel *channel, struct session *session)
{
    uint8_t *at = channel_room(channel, 512);
    if (!at)
        return;
    struct field_writer writer = {at + HEADER_BYTES, 512, 0, false};
    put_exit(&writer, session);
    channel_send(channel, FRAME_EXIT, 0, session->id, writer.length);
    if (session->kept)
        session->kept->exit_sent = true; /* the client may not have it yet */
    else
        free_session(session);
}

static void send_resumed(struct channel *channel, struct session *session)
{
    uint8_t *at = channel_room(channel, 64);
    if (!at)
        return;
    struct field_writer writer = {at + HEADER_BYTES, 64, 0, false};
    put_u64_field(&writer, TAG_RECEIVED, session->received);
    put_u32_field(&writer, TAG_WAITING, WINDOW - session->allowance);
    put_u8_field(&writer, TAG_INPUT_ENDED, session->input_got_end);
    if (session->kept->tell_sent) {
        put_u64_field(&writer, TAG_SENT, session->kept->granted);
        put_u8_field(&writer, TAG_TTY, session->tty);
    }
    channel_send(channel, FRAME_RESUMED, 0, session->id, writer.length);
    session->kept->resumed_sent = true;
}

/* Sends a resumed session's output again, as far as there is room. */
static void resend_output(struct channel *channel, struct session *session)
{
    struct kept *kept = session->kept;
    if (!kept->resumed_sent)
        send_resumed(channel, session);
    while (kept->resumed_sent && kept->resend < kept->end) {
        const uint8_t *record = kept->records + kept->resend;
        size_t length = get_u32(record + 1);
        uint8_t *at = channel_room(channel, length);
        if (!at)
            return;
        memcpy(at + HEADER_BYTES, record + RECORD_HEADER, length);
        channel_send(channel, record[0], 0, session->id, length);
        kept->resend += RECORD_HEADER + length;
    }
}

static bool must_resend(const struct session *session)
{
    const struct kept *kept = session->kept;
    return kept && !kept->detached && (!kept->resumed_sent || kept->resend < kept->end);
}

/* Bytes of output that may be read and sent now, apart from the channel's room. */
static size_t may_send(const struct session *session)
{
    size_t bytes = session->credit;
    if (!session->kept)
        return bytes;
    if (spills(session))
        return workload_room();
    if (is_detached(session) || must_resend(session))
        return 0;
    if (session->is_main && workload_room() < bytes)
        bytes = workload_room();
    return bytes < room_to_keep(session->kept) ? bytes : room_to_keep(session->kept);
}

static void grant(struct channel *channel, struct session *session)
{
    uint8_t *at = channel_room(channel, 4);
    if (!at)
        return;
    put_u32(at + HEADER_BYTES, session->consumed);
    channel_send(channel, FRAME_CREDIT, 0, session->id, 4);
    session->allowance += session->consumed;
    session->consumed = 0;
}

void sessions_step(struct channel *channel)
{
    turn = (turn + 1) % MAX_SESSIONS;
    int64_t now = now_ms();
    for (size_t i = 0; i < MAX_SESSIONS; i++) {
        struct session *session = &sessions[(turn + i) % MAX_SESSIONS];
        if (!session->id)
            continue;
        if (session->deadline && now >= session->deadline && !session->reaped) {
            session->timed_out = true;
            session->deadline = 0;
            kill_session(session->child.pid);
        }
        if (is_detached(session)) {
            if (!session->stays && now - session->kept->detached >= keep_ms)
                session_drop(session);
            continue;
        }
        if (must_resend(session))
            resend_output(channel, session);
        if (session->consumed >= GRANT_BYTES)
            grant(channel, session);
        if (session->reaped && session->child.out < 0 && session->child.err < 0 && !must_resend(session)
            && !(session->kept && session->kept->exit_sent))
            send_exit(channel, session);
    }
}

static size_t watch(struct pollfd *fds, size_t n, struct session *session, enum role role, int fd)
{
    fds[n] = (struct pollfd){fd, role == ROLE_IN ? POLLOUT : POLLIN, 0};
    pollers[n] = (struct poller){session, role};
    return n + 1;
}

size_t sessions_poll(struct channel *channel, struct pollfd *fds, size_t count)
{
    bool room = channel_room(channel, MAX_PAYLOAD) != NULL;
    size_t n = 0;
    for (size_t i = 0; i < MAX_SESSIONS; i++) {
        struct session *session = &sessions[(turn + i) % MAX_SESSIONS];
        if (!session->id)
            continue;
        bool sends = (room || spills(session)) && may_send(session) > 0;
        bool has_input = session->input_begin < session->input_end || session->input_ends;
        if (session->child.in >= 0 && has_input)
            n = watch(fds + count, n, session, ROLE_IN, session->child.in);
        if (session->child.out >= 0 && sends)
            n = watch(fds + count, n, session, ROLE_OUT, session->child.out);
        if (session->child.err >= 0 && sends)
            n = watch(fds + count, n, session, ROLE_ERR, session->child.err);
    }
    return count + n;
}

static void spill(struct session *session, int *fd)
{
    uint8_t buffer[4096];
    size_t room = workload_room(), want = room < sizeof buffer ? room : sizeof buffer;
    ssize_t n = want ? read(*fd, buffer, want) : 0;
    if (n > 0)
        workload_print(buffer, (size_t)n);
    else if (want && (n == 0 || (errno != EAGAIN && errno != EINTR) || (errno == EAGAIN && session->reaped)))
        close_fd(fd);
}

/* Reads straight into a frame. Of a child that has ended, what is left is read until there is no more: others
 * may hold its pipes open indefinitely. */
static void pull_output(struct channel *channel, struct session *session, int *fd, uint8_t type)
{
    if (spills(session)) {
        spill(session, fd);
        return;
    }
    size_t allowed = may_send(session), want = allowed < MAX_PAYLOAD ? allowed : MAX_PAYLOAD;
    uint8_t *at = channel_room(channel, want);
    if (!at || want == 0)
        return;
    ssize_t n = read(*fd, at + HEADER_BYTES, want);
    if (n > 0) {
        session->credit -= (uint32_t)n;
        if (session->is_main)
            workload_print(at + HEADER_BYTES, (size_t)n);
        if (session->kept)
            keep_output(session->kept, type, at + HEADER_BYTES, (size_t)n);
        channel_send(channel, type, 0, session->id, (size_t)n);
    } else if (n == 0 || (errno != EAGAIN && errno != EINTR) || (errno == EAGAIN && session->reaped)) {
        close_fd(fd);
    }
}

void sessions_io(struct channel *channel, const struct pollfd *fds, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        struct session *session = pollers[i].session;
        if (!session->id || (!fds[i].revents && !session->reaped))
            continue;
        if (pollers[i].role == ROLE_IN && session->child.in >= 0)
            push_input(session);
        else if (pollers[i].role == ROLE_OUT && session->child.out >= 0)
            pull_output(channel, session, &session->child.out, FRAME_DATA);
        else if (pollers[i].role == ROLE_ERR && session->child.err >= 0)
            pull_output(channel, session, &session->child.err, FRAME_STDERR);
    }
}

int sessions_timeout(struct channel *channel)
{
    int64_t next = -1, now = now_ms();
    bool room = channel_room(channel, MAX_PAYLOAD) != NULL;
    for (size_t i = 0; i < MAX_SESSIONS; i++) {
        const struct session *session = &sessions[i];
        if (!session->id)
            continue;
        int64_t wait = -1;
        if (session->deadline)
            wait = session->deadline > now ? session->deadline - now : 0;
        /* poll does not report that a child has ended whose output others keep open. */
        if (session->reaped && (room || spills(session)) && may_send(session) > 0 && is_open(session))
            wait = 0;
        if (must_resend(session) && room)
            wait = 0;
        if (is_detached(session) && !session->stays) {
            int64_t left = session->kept->detached + keep_ms - now;
            wait = wait < 0 || left < wait ? (left > 0 ? left : 0) : wait;
        }
        if (wait >= 0 && (next < 0 || wait < next))
            next = wait;
    }
    return (int)(next > 60000 ? 60000 : next);
}
