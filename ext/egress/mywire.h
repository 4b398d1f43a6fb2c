/* Messages of the MySQL protocol up to the end of authentication: read with bounds, and written. Pure.
 *
 * Each packet has three bytes of length, low one first, a sequence number and a body. The server speaks first. What a
 * parser returns points into the caller's buffer.
 * https://dev.mysql.com/doc/dev/mysql-server/latest/page_protocol_connection_phase.html
 */
#ifndef HYPEMAN_EGRESS_MYWIRE_H
#define HYPEMAN_EGRESS_MYWIRE_H

#include "verdict.h"

enum {
    MY_HEADER = 4,
    MY_SCRAMBLE = 20,
    MY_NAME_MAX = 128,     /* of users, as in MariaDB; MySQL has 32 */
    MY_VERSION_MAX = 64,   /* text of a server's version */
    MY_PLUGIN_MAX = 64,    /* name of a way to authenticate */
    MY_SSL_REQUEST = 32,   /* bytes of its body: a response that ends before the user */
    MY_LOGIN_MAX = 65536,  /* bytes of a client's first packet: the server takes as many of attributes alone */
    MY_ANSWER_MAX = 2048,  /* of its later ones */
    MY_PACKET_MAX = 16384, /* of a server's, until the session is ready */
};

/* Capabilities that something here depends on, or that change how bytes are framed. */
#define MY_LONG_PASSWORD 0x1u /* MariaDB does not set it if it has further ones */
#define MY_WITH_DATABASE 0x8u
#define MY_COMPRESS 0x20u
#define MY_PROTOCOL_41 0x200u
#define MY_SSL 0x800u
#define MY_SECURE 0x8000u /* passwords as of MySQL 4.1, and the length of the answer */
#define MY_PLUGINS 0x80000u
#define MY_ATTRIBUTES 0x100000u
#define MY_LONG_ANSWER 0x200000u
/* What client and server agree on through us: nothing that compresses, nor a second factor, nor what is unknown. */
#define MY_PASSED 0x0bffffdfu
/* What every server has had for ten years, for a client that is greeted before there is a server. */
#define MY_USUAL 0x007fffdfu
/* MariaDB: progress, bulk operations, extended and cached metadata, results of bulk operations. */
#define MY_PASSED_FURTHER 0x3du

#define MY_NATIVE "mysql_native_password"
#define MY_SHA2 "caching_sha2_password"
#define MY_CLEAR "mysql_clear_password"

enum my_read { MY_BAD = -1, MY_MORE, MY_OK };

struct my_packet {
    size_t size; /* with its head */
    uint8_t sequence;
    struct str body;
};

enum my_read my_read_packet(const char *p, size_t n, size_t most, struct my_packet *out);

/* A server's first packet. */
struct my_greeting {
    struct str version;
    uint32_t thread;
    char scramble[MY_SCRAMBLE];
    uint32_t capabilities, further;
    uint8_t charset;
    uint16_t status;
    struct str plugin; /* empty: the server knows of none */
};

bool my_read_greeting(struct str body, struct my_greeting *out);

/* A client's answer to it. */
struct my_login {
    bool wants_tls; /* it ends there and comes again, over TLS */
    uint32_t capabilities, further, packet_max;
    uint8_t charset;
    struct str user, answer, database, plugin;
    struct str attributes; /* names and values as they were sent, without the length in front */
};

bool my_read_login(struct str body, struct my_login *out);

/* The server's bodies by their first byte. */
enum my_kind { MY_KIND_OK = 0, MY_KIND_MORE = 1, MY_KIND_SWITCH = 0xfe, MY_KIND_ERROR = 0xff };
/* What MY_KIND_MORE has for caching_sha2_password: it had the password in its cache; it wants the password itself. */
enum my_sha2 { MY_SHA2_DONE = 3, MY_SHA2_WANTED = 4 };

int my_kind(struct str body); /* -1: none of them */
/* To authenticate in another way: which, and the data for it without a zero byte at its end. */
bool my_read_switch(struct str body, struct str *plugin, struct str *data);
bool my_read_error(struct str body, unsigned *code, struct str *state);

void my_write(struct out *o, uint8_t sequence, struct str body);
void my_write_greeting(struct out *o, const struct my_greeting *g);
/* Only its beginning if it wants TLS. The answer has at most 255 bytes. */
void my_write_login(struct out *o, uint8_t sequence, const struct my_login *l);
void my_write_switch(struct out *o, uint8_t sequence, const char *plugin, const char scramble[MY_SCRAMBLE]);
/* `state` NULL: capabilities are not agreed on yet, so that there is none. */
void my_write_error(struct out *o, uint8_t sequence, unsigned code, const char *state, const char *message);

#endif
