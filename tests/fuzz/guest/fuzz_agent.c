/* libFuzzer target for what the guest parses: the byte stream of the channel, and the boot disk.
 *
 * The first byte of the input selects. Frames: for any bytes, cut in any way, every frame is inside the input, and
 * after any garbage a greeting is recognised. Boot disk: a configuration that is accepted has only texts that end
 * inside the input.
 *
 *   make -C tests/fuzz/guest run SECONDS=60
 */
#include <stdlib.h>
#include <string.h>

#include "boot_config.h"
#include "bytes.h"
#include "fields.h"
#include "frame.h"

static const uint8_t TOKEN[TOKEN_BYTES] = "0123456789abcdef";

static void check(bool condition)
{
    if (!condition)
        abort();
}

/* Takes all frames that are there; walks their fields. */
static void drain(struct frame_reader *reader, uint32_t *sum)
{
    struct frame frame;
    enum frame_result result;
    while ((result = next_frame(reader, &frame)) != FRAME_NONE) {
        if (result != FRAME_READY)
            continue;
        check(frame.length <= MAX_PAYLOAD);
        check(frame.payload >= reader->buffer && frame.payload + frame.length <= reader->buffer + reader->end);
        struct field_reader fields = read_fields(frame.payload, frame.length);
        struct field field;
        const char *text;
        while (next_field(&fields, &field))
            *sum += field_text(&field, &text) ? (uint32_t)strlen(text) : field.tag;
    }
}

static void feed(struct frame_reader *reader, const uint8_t *data, size_t size, size_t piece, uint32_t *sum)
{
    while (size > 0) {
        size_t room, n = size < piece ? size : piece;
        uint8_t *space = frame_space(reader, &room);
        check(room > 0);
        n = n < room ? n : room;
        memcpy(space, data, n);
        frame_filled(reader, n);
        drain(reader, sum);
        data += n;
        size -= n;
    }
}

static void fuzz_frames(const uint8_t *data, size_t size)
{
    static struct frame_reader reader;
    static const uint8_t zeros[FLUSH_BYTES];
    uint8_t greeting[SYNC_BYTES];
    uint32_t sum = 0;
    memcpy(greeting, SYNC_MAGIC, MAGIC_BYTES);
    memcpy(greeting + MAGIC_BYTES, TOKEN, TOKEN_BYTES);
    put_u32(greeting + MAGIC_BYTES + TOKEN_BYTES, crc32_of(greeting, MAGIC_BYTES + TOKEN_BYTES));
    memset(&reader, 0, sizeof reader);
    size_t piece = size > 0 ? 1 + data[0] * 64u : 1;
    feed(&reader, greeting, sizeof greeting, sizeof greeting, &sum);
    check(reader.synced);
    feed(&reader, data, size, piece, &sum);
    feed(&reader, zeros, sizeof zeros, sizeof zeros, &sum);
    feed(&reader, greeting, sizeof greeting, piece, &sum);
    check(reader.synced && memcmp(reader.token, TOKEN, TOKEN_BYTES) == 0);
}

static void fuzz_boot(const uint8_t *data, size_t size)
{
    static struct boot_config config;
    uint32_t length, crc, offset;
    if (size >= BOOT_HEADER_BYTES && parse_boot_header(data, &length, &crc, &offset) == NULL)
        check(length <= BOOT_MAX_FIELDS && offset % 512 == 0);
    uint8_t *copy = malloc(size + 1); /* exactly as long: ASan sees an access past the end */
    memcpy(copy, data, size);
    copy = realloc(copy, size ? size : 1);
    if (parse_boot_fields(&config, copy, size) == NULL) {
        size_t total = strlen(config.instance_id) + strlen(config.root_fs) + strlen(config.hostname);
        for (char **s = config.argv; *s; s++)
            total += strlen(*s) + 1;
        for (char **s = config.env; *s; s++)
            total += strlen(*s) + 1;
        for (size_t i = 0; i < config.volume_count; i++)
            total += strlen(config.volumes[i].disk_id) + strlen(config.volumes[i].path);
        for (size_t i = 0; i < config.ca_count; i++)
            total += strlen(config.cas[i].pem);
        check(total <= 4 * size);
    }
    free(copy);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0)
        return 0;
    if (data[0] & 1)
        fuzz_boot(data + 1, size - 1);
    else
        fuzz_frames(data + 1, size - 1);
    return 0;
}
