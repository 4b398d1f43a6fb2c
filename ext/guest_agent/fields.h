/* Fields: the one encoding of requests, replies, events and the boot disk.
 *
 * u16 tag, u32 length, value, one after the other. Text carries its closing NUL, so it is read in place. Readers never
 * step outside the bytes they were given and never allocate.
 */
#ifndef HM_FIELDS_H
#define HM_FIELDS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FIELD_HEADER_BYTES 6

struct field {
    uint16_t tag;
    uint32_t length;
    const uint8_t *value;
};

struct field_reader {
    const uint8_t *at, *end;
    bool malformed;
};

static inline struct field_reader read_fields(const uint8_t *data, size_t length)
{
    return (struct field_reader){data, data + length, false};
}

/* The next field; false at the end or at the first malformed one, which reader->malformed tells apart. */
bool next_field(struct field_reader *reader, struct field *field);

/* Typed values: false, and nothing stored, if the length or the NUL is not what the type requires. */
bool field_text(const struct field *field, const char **out);
bool field_bool(const struct field *field, bool *out);
bool field_u8(const struct field *field, uint8_t *out);
bool field_u16(const struct field *field, uint16_t *out);
bool field_u32(const struct field *field, uint32_t *out);
bool field_u64(const struct field *field, uint64_t *out);
bool field_bytes(const struct field *field, void *out, size_t length);

/* Writes into a buffer of fixed size; `overflow` stays set once something did not fit. */
struct field_writer {
    uint8_t *buffer;
    size_t capacity, length;
    bool overflow;
};

void put_field(struct field_writer *writer, uint16_t tag, const void *value, size_t length);
void put_text_field(struct field_writer *writer, uint16_t tag, const char *text);
void put_u8_field(struct field_writer *writer, uint16_t tag, uint8_t value);
void put_u32_field(struct field_writer *writer, uint16_t tag, uint32_t value);
void put_u64_field(struct field_writer *writer, uint16_t tag, uint64_t value);

#endif
