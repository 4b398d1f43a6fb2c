/* The protocol between host and guest: the one table of its numbers.
 *
 * Twin of hypeman/guest/protocol.py; the golden frames in tests/golden/guest check that both produce the same bytes.
 * All integers are little endian.
 *
 *   greeting, host → guest    FLUSH_BYTES zero bytes, then SYNC_MAGIC, 16-byte token, CRC-32 of both
 *   answer, guest → host      ACK_MAGIC, the token, the 16-byte nonce of this boot, u16 version, u16 flags, CRC-32
 *   frame, both ways          u32 mark, u8 type, u8 flags, u16 length, u32 session; payload; u32 trailer
 *
 * Mark and trailer are bytes 0..3 and 4..7 of the token, so a frame of an earlier connection is never
 * taken for one of this connection. A virtio-serial port may deliver the rest of what an earlier host
 * process sent: the zero bytes complete whatever frame was cut, its trailer is then wrong, and the guest
 * looks for SYNC_MAGIC. The host discards everything until its own token comes back.
 */
#ifndef HM_PROTOCOL_H
#define HM_PROTOCOL_H

#define PROTOCOL_VERSION 1

#define SYNC_MAGIC "HYPEMAN\x01"
#define ACK_MAGIC "HYPEMAN\x02"
#define MAGIC_BYTES 8
#define TOKEN_BYTES 16
#define NONCE_BYTES 16
#define SYNC_BYTES (MAGIC_BYTES + TOKEN_BYTES + 4)
#define ACK_BYTES (MAGIC_BYTES + TOKEN_BYTES + NONCE_BYTES + 2 + 2 + 4)
#define ACK_FLAG_NO_AGENT 1 /* exec, copy and stat are switched off */
#define ACK_FLAG_KEEPS 2    /* knows TAG_SESSION_KEY, OP_RESUME, FRAME_DETACH and FRAME_RESUMED */

#define HEADER_BYTES 12
#define TRAILER_BYTES 4
#define MAX_PAYLOAD 32768
#define FLUSH_BYTES (HEADER_BYTES + MAX_PAYLOAD + TRAILER_BYTES)

/* Each side may send this much in a session before the other grants more with CREDIT. */
#define WINDOW 524288
#define MAX_SESSIONS 128
/* A program whose OPEN has a TAG_SESSION_KEY is kept for KEEP_MS when its connection is lost, or detached with
 * FRAME_DETACH. A session of another connection continues it: OP_RESUME names the key and how many bytes of output the
 * host's client has. So a CREDIT grants what the client has, not what the host has: until then the guest keeps it, at
 * most KEPT_BYTES. Of a kept program FRAME_EXIT is not the last frame: the host answers with CLOSE. */
#define KEY_BYTES 16
/* In an idle instance the program with this key is the instance's own: with its end the machine ends, what it prints is in
 * the log, and a host that detaches it with FLAG_STAYS leaves it running as long as it likes. */
#define MAIN_KEY "hypeman-program!"
#define KEPT_BYTES 131072
#define KEEP_MS 60000
/* A request may span several OPEN frames, up to this. */
#define MAX_REQUEST 262144

#define AGENT_PORT_NAME "hypeman.agent"
#define AGENT_VSOCK_PORT 1024

enum frame_type {
    FRAME_OPEN = 1,       /* h→g  u8 op, fields; FLAG_MORE: the request continues in the next OPEN frame */
    FRAME_DATA = 2,       /* h→g  standard input, FLAG_END closes it; g→h standard output or reply */
    FRAME_STDERR = 3,     /* g→h */
    FRAME_CREDIT = 4,     /* both u32 more bytes may be sent in this session */
    FRAME_SIGNAL = 5,     /* h→g  u32 signal for the process group */
    FRAME_RESIZE = 6,     /* h→g  u16 rows, u16 columns */
    FRAME_CLOSE = 7,      /* h→g  end it, kill its processes; no answer */
    FRAME_EXIT = 8,       /* g→h  fields; the last frame of a session */
    FRAME_EVENT = 9,      /* g→h  u8 event, fields; session 0; sent again on each connection */
    FRAME_EVENT_ACK = 10, /* h→g  u8 event */
    FRAME_DETACH = 11,    /* h→g  the host leaves a kept session; no answer */
    FRAME_RESUMED = 12    /* g→h  fields; the first frame of a session that OP_RESUME opened */
};

#define FLAG_MORE 1
#define FLAG_END 2
#define FLAG_STAYS 4 /* of FRAME_DETACH */

enum op {
    OP_EXEC = 1,
    OP_STAT = 2,
    OP_COPY_TO = 3,
    OP_COPY_FROM = 4,
    OP_SHUTDOWN = 5,
    OP_CLOCK = 6, /* answered at once with the guest's time; CLOCK_NS sets it, CLOCK_DELTA_NS moves it */
    OP_IDENTITY = 7,
    OP_MOUNT = 8,
    OP_UNMOUNT = 9,
    OP_MEMORY = 10,
    OP_METRICS = 11,
    OP_FREEZE = 12,
    OP_THAW = 13,
    OP_PING = 14, /* answered at once with an empty reply: the agent is alive */
    OP_RESUME = 15,
    OP_WARM = 16 /* executes a program of the agent's that ends at once, also while the others are frozen */
};

enum event { EVENT_READY = 1, EVENT_STARTED = 2, EVENT_EXITED = 3, EVENT_FATAL = 4 };
#define EVENT_COUNT 5

enum file_kind { KIND_FILE = 1, KIND_DIR = 2, KIND_SYMLINK = 3, KIND_OTHER = 4, KIND_HARD_LINK = 5 };

/* Fields are u16 tag, u32 length, value. Text ends in a NUL byte that the length counts. */
enum tag {
    TAG_ARG = 1,
    TAG_ENV = 2,
    TAG_CWD = 3,
    TAG_USER = 4,
    TAG_TTY = 5,
    TAG_ROWS = 6,
    TAG_COLS = 7,
    TAG_TIMEOUT_MS = 8,
    TAG_SESSION_KEY = 9,
    TAG_PATH = 10,
    TAG_FOLLOW_LINKS = 11,
    TAG_KIND = 12,
    TAG_MODE = 13,
    TAG_UID = 14,
    TAG_GID = 15,
    TAG_SIZE = 16,
    TAG_MTIME = 17,
    TAG_LINK_TARGET = 18,
    TAG_EXISTS = 19,
    TAG_INSTANCE_ID = 20,
    TAG_HOSTNAME = 21,
    TAG_NONCE = 22,
    TAG_MACHINE_ID = 23,
    TAG_ENTROPY = 24,
    TAG_CLOCK_NS = 25,
    TAG_CLOCK_DELTA_NS = 26, /* i64 */
    TAG_MAC = 30,
    TAG_ADDRESS = 31,
    TAG_PREFIX = 32,
    TAG_GATEWAY = 33,
    TAG_DNS = 34,
    TAG_MTU = 35,
    TAG_VOLUME = 40,
    TAG_DISK_ID = 41,
    TAG_READONLY = 42,
    TAG_FS_TYPE = 43,
    TAG_OVERLAY_DISK_ID = 44,
    TAG_VOLUME_DIR = 45,
    TAG_FILES = 46,
    TAG_CA = 50,
    TAG_CA_PEM = 51,
    TAG_CA_HASH = 52,
    TAG_STOP_SIGNAL = 60,
    TAG_GRACE_MS = 61,
    TAG_SKIP_AGENT = 62,
    TAG_CONSOLE = 63,
    TAG_POWER_OFF_BY_RESET = 64,
    TAG_DISK_ORDER = 65,
    TAG_ROOT_FS = 66,
    TAG_OVERLAY = 67,
    TAG_PID1 = 68, /* u8 enum pid1 */
    TAG_SHM_BYTES = 69,
    TAG_PHASE = 70,
    TAG_PHASE_NAME = 71,
    TAG_PHASE_MS = 72,
    TAG_EXIT_CODE = 73,
    TAG_SIGNAL = 74,
    TAG_OOM = 75,
    TAG_MESSAGE = 76,
    TAG_TIMED_OUT = 77,
    TAG_MEMORY_TOTAL = 80,
    TAG_MEMORY_AVAILABLE = 81,
    TAG_LOAD_1 = 82,
    TAG_LOAD_5 = 83,
    TAG_LOAD_15 = 84,
    TAG_UPTIME_MS = 85,
    TAG_PROCESSES = 86,
    TAG_HOLDER = 87,
    TAG_SYSCTL = 88, /* text "name=value" */
    TAG_ULIMIT = 89, /* u32 resource, u64 soft, u64 hard */
    TAG_IDLE = 90,
    TAG_RECEIVED = 91, /* u64 bytes of a kept program's output that the client has, or of input that the guest has */
    TAG_WAITING = 92,  /* u32 bytes of input that the program has not read yet */
    TAG_INPUT_ENDED = 93,
    TAG_SENT =
        94 /* u64 bytes of output before those that follow; like TAG_TTY only if the host did not say what its client has */
};

enum pid1 { PID1_DETECT = 0, PID1_AGENT = 1, PID1_WORKLOAD = 2 };

/* The boot disk: header, fields, zero padding; its last OUTCOME_BYTES are where the guest writes how it ended. */
#define BOOT_MAGIC "HYPEBOOT"
#define BOOT_HEADER_BYTES 24 /* magic, u32 version, u32 length of fields, u32 their CRC-32, u32 offset of the outcome */
#define BOOT_MAX_FIELDS (1024 * 1024)
#define OUTCOME_MAGIC "HYPEOVER"
#define OUTCOME_BYTES 4096 /* magic, u32 length, u32 CRC-32, nonce, then an event frame's payload */

#endif
