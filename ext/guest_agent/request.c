#define _GNU_SOURCE
#include "request.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bytes.h"
#include "clock.h"
#include "events.h"
#include "fields.h"
#include "freezer.h"
#include "identity.h"
#include "machine.h"
#include "program.h"
#include "session.h"
#include "worker.h"
#include "workload.h"

#define MAX_ARGS 4096

/* Requests that a worker carries out; start_request handles the others. */
static const struct {
    worker_function function;
    bool needs_agent; /* works on the guest's files */
} WORKERS[] = {
    [OP_STAT] = {stat_worker, true},           [OP_COPY_TO] = {copy_to_worker, true},
    [OP_COPY_FROM] = {copy_from_worker, true}, [OP_MOUNT] = {mount_worker, false},
    [OP_UNMOUNT] = {unmount_worker, false},    [OP_MEMORY] = {memory_worker, false},
    [OP_METRICS] = {metrics_worker, false},
};

static bool take(char **list, size_t *count, const struct field *field)
{
    const char *text;
    if (*count >= MAX_ARGS || !field_text(field, &text))
        return false;
    list[(*count)++] = (char *)text;
    return true;
}

static void start_exec(const struct boot_config *config, struct session *session, struct field_reader *reader)
{
    static char *argv[MAX_ARGS + 1], *env[MAX_ARGS + 1];
    size_t arg_count = 0, env_count = 0;
    uint64_t timeout_ms = 0;
    const char *cwd = NULL;
    uint8_t key[KEY_BYTES];
    bool keep = false;
    struct program program = {.user = "", .base_env = config->env, .cgroup = EXEC_CGROUP};
    struct child child;
    struct field field;
    bool good = true;
    while (good && next_field(reader, &field)) {
        switch (field.tag) {
        case TAG_ARG:
            good = take(argv, &arg_count, &field);
            break;
        case TAG_ENV:
            good = take(env, &env_count, &field);
            break;
        case TAG_CWD:
            good = field_text(&field, &cwd);
            break;
        case TAG_USER:
            good = field_text(&field, &program.user);
            break;
        case TAG_TTY:
            good = field_bool(&field, &program.tty);
            break;
        case TAG_ROWS:
            good = field_u16(&field, &program.rows);
            break;
        case TAG_COLS:
            good = field_u16(&field, &program.cols);
            break;
        case TAG_TIMEOUT_MS:
            good = field_u64(&field, &timeout_ms) && timeout_ms <= INT64_MAX / 2;
            break;
        case TAG_SESSION_KEY:
            good = keep = field_bytes(&field, key, sizeof key);
            break;
        default:
            good = false;
        }
    }
    if (!good || reader->malformed || arg_count == 0) {
        session_refuse(session, 126, "exec: malformed request");
        return;
    }
    argv[arg_count] = env[env_count] = NULL;
    program.argv = argv;
    program.env = env;
    if (config->idle && !*program.user)
        program.user = config->user;
    /* By default the image's working directory, which is created if it is missing. */
    program.cwd = cwd ? cwd : config->cwd;
    program.make_cwd = !cwd;
    bool is_main = keep && memcmp(key, MAIN_KEY, KEY_BYTES) == 0;
    if (is_main)
        program.cgroup = WORKLOAD_CGROUP;
    if (is_main && !workload_idles())
        session_refuse(session, 126, "this instance has a program of its own");
    else if (keep && !session_keep(session, key))
        session_refuse(session, 126, strerror(ENOMEM));
    else if (start_program(&program, &child) < 0)
        session_refuse(session, 126, strerror(errno));
    else {
        session_started(session, &child, true, program.tty, (int64_t)timeout_ms);
        if (is_main)
            workload_adopt(child.pid);
    }
}

static void start_identity(const struct boot_config *config, struct channel *channel, struct session *session,
                           struct field_reader reader)
{
    const char *failed;
    char text[128] = "";
    int error = apply_identity(config, reader, channel->nonce, &failed) < 0 ? errno : 0;
    if (error)
        snprintf(text, sizeof text, "%s: %s", failed, strerror(error));
    session_refuse(session, error, text);
}

/* All that an exec needs but the image's program: under emulation the first run takes ten times as long as others. */
static void start_warm(struct session *session)
{
    static char *const argv[] = {"/proc/self/exe", NULL}, *const env[] = {NULL};
    struct program program = {.argv = argv, .env = env, .base_env = env, .cwd = "/", .user = "", .apart = true};
    struct child child;
    if (start_program(&program, &child) < 0)
        session_refuse(session, errno, strerror(errno));
    else
        session_started(session, &child, true, false, 0);
}

static void resume(struct session *session, struct field_reader *reader)
{
    struct field field;
    uint8_t key[KEY_BYTES];
    uint64_t received = UINT64_MAX;
    bool has_key = false, good = true;
    while (good && next_field(reader, &field)) {
        switch (field.tag) {
        case TAG_SESSION_KEY:
            good = has_key = field_bytes(&field, key, sizeof key);
            break;
        case TAG_RECEIVED:
            good = field_u64(&field, &received);
            break;
        default:
            good = false;
        }
    }
    if (!good || reader->malformed || !has_key)
        session_refuse(session, EINVAL, "resume: malformed request");
    else if (!session_resume(session, key, received))
        session_refuse(session, ENOENT, "the program is no longer kept");
}

static void start_shutdown(struct session *session, struct field_reader *reader)
{
    struct field field;
    uint32_t signal = 0;
    uint64_t grace_ms = UINT64_MAX;
    while (next_field(reader, &field)) {
        bool good = false;
        switch (field.tag) {
        case TAG_STOP_SIGNAL:
            good = field_u32(&field, &signal) && signal <= 64;
            break;
        case TAG_GRACE_MS:
            good = field_u64(&field, &grace_ms);
            break;
        }
        reader->malformed |= !good;
    }
    if (reader->malformed) {
        session_refuse(session, EINVAL, "shutdown: malformed request");
        return;
    }
    machine_stop((int)signal, grace_ms);
    session_refuse(session, 0, "");
}

static void start_request(const struct boot_config *config, struct channel *channel, struct session *session,
                          const uint8_t *request, size_t length)
{
    struct child child;
    uint8_t op = request[0];
    bool is_worker = op < sizeof WORKERS / sizeof *WORKERS && WORKERS[op].function;
    struct field_reader reader = read_fields(request + 1, length - 1);
    if (op == OP_IDENTITY) {
        start_identity(config, channel, session, reader);
    } else if (config->skip_agent && (op == OP_EXEC || (is_worker && WORKERS[op].needs_agent))) {
        session_refuse(session, EOPNOTSUPP, "this instance was created without the guest agent");
    } else if (op == OP_EXEC) {
        start_exec(config, session, &reader);
    } else if (op == OP_RESUME) {
        resume(session, &reader);
    } else if (op == OP_WARM) {
        start_warm(session);
    } else if (op == OP_SHUTDOWN) {
        start_shutdown(session, &reader);
    } else if (op == OP_FREEZE || op == OP_THAW) {
        int error = op == OP_FREEZE ? freeze_guest() : thaw_guest();
        if (op == OP_THAW)
            sessions_stay();
        session_refuse(session, error, error ? strerror(error) : "");
    } else if (op == OP_CLOCK) {
        answer_clock(channel, session, &reader);
    } else if (op == OP_PING) {
        session_refuse(session, 0, "");
    } else if (!is_worker) {
        session_refuse(session, ENOSYS, "this agent does not know the request");
    } else if (start_worker(WORKERS[op].function, WORKERS[op].needs_agent, request + 1, length - 1, &child) < 0) {
        session_refuse(session, errno, strerror(errno));
    } else {
        session_started(session, &child, false, false, 0);
    }
}

static bool open_session(const struct boot_config *config, struct channel *channel, const struct frame *frame)
{
    struct session *session = session_find(frame->session);
    const uint8_t *request = frame->payload;
    size_t length = frame->length;
    if (session && !session->request)
        return false;
    if (!session && (frame->session == 0 || !(session = session_new(frame->session))))
        return false;
    if (session->request || (frame->flags & FLAG_MORE)) {
        if (session->request_length + length > MAX_REQUEST)
            return false;
        uint8_t *grown = realloc(session->request, session->request_length + length + 1);
        if (!grown) {
            session_refuse(session, ENOMEM, "no memory for the request");
            return true;
        }
        session->request = grown;
        memcpy(grown + session->request_length, request, length);
        session->request_length += length;
        if (frame->flags & FLAG_MORE)
            return true;
        request = session->request;
        length = session->request_length;
    }
    if (length == 0)
        return false;
    uint8_t *whole = session->request;
    session->request = NULL; /* OP_RESUME frees the slot */
    start_request(config, channel, session, request, length);
    free(whole);
    return true;
}

bool handle_frame(const struct boot_config *config, struct channel *channel, const struct frame *frame)
{
    if (frame->type == FRAME_OPEN)
        return open_session(config, channel, frame);
    if (frame->type == FRAME_EVENT_ACK) {
        if (frame->length == 1)
            event_acknowledged(frame->payload[0]);
        return frame->length == 1;
    }
    struct session *session = session_find(frame->session);
    switch (frame->type) {
    case FRAME_DATA:
        if (frame->length == 0 && !(frame->flags & FLAG_END))
            return false; /* uses no credit, so it could be repeated endlessly */
        return !session || session_input(session, frame->payload, frame->length, frame->flags & FLAG_END);
    case FRAME_CREDIT:
        return frame->length == 4 && (!session || session_granted(session, get_u32(frame->payload)));
    case FRAME_SIGNAL:
        if (frame->length != 4 || get_u32(frame->payload) > 64)
            return false;
        if (session)
            session_signal(session, (int)get_u32(frame->payload));
        return true;
    case FRAME_RESIZE:
        if (frame->length != 4)
            return false;
        if (session)
            session_resize(session, get_u16(frame->payload), get_u16(frame->payload + 2));
        return true;
    case FRAME_CLOSE:
        if (session)
            session_drop(session);
        return true;
    case FRAME_DETACH:
        if (session && session->kept)
            session_detach(session, frame->flags & FLAG_STAYS);
        else if (session)
            session_drop(session);
        return true;
    default:
        return false;
    }
}
