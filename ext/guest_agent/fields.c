#include "fields.h"

#include <string.h>

#include "bytes.h"

bool next_field(struct field_reader *reader, struct field *field)
{
    size_t left = (size_t)(reader->end - reader->at);
    if (left == 0 || reader->malformed)
        return false;
    if (left < FIELD_HEADER_BYTES || get_u32(reader->at + 2) > left - FIELD_HEADER_BYTES) {
        reader->malformed = true;
        return false;
    }
    field->tag = get_u16(reader->at);
    field->length = get_u32(reader->at + 2);
    field->value = reader->at + FIELD_HEADER_BYTES;
    reader->at = field->value + field->length;
    return true;
}

bool field_text(const struct field *field, const char **out)
{
    if (field->length == 0 || memchr(field->value, 0, field->length) != field->value + field->length - 1)
        return false;
    *out = (const char *)field->value;
    return true;
}

bool field_u8(const struct field *field, uint8_t *out)
{
    if (field->length != 1)
        return false;
    *out = field->value[0];
    return true;
}

bool field_bool(const struct field *field, bool *out)
{
    if (field->length != 1 || field->value[0] > 1)
        return false;
    *out = field->value[0];
    return true;
}

bool field_u16(const struct field *field, uint16_t *out)
{
    if (field->length != 2)
        return false;
    *out = get_u16(field->value);
    return true;
}

bool field_u32(const struct field *field, uint32_t *out)
{
    if (field->length != 4)
        return false;
    *out = get_u32(field->value);
    return true;
}

bool field_u64(const struct field *field, uint64_t *out)
{
    if (field->length != 8)
        return false;
    *out = get_u64(field->value);
    return true;
}

bool field_bytes(const struct field *field, void *out, size_t length)
{
    if (field->length != length)
        return false;
    memcpy(out, field->value, length);
    return true;
}

void put_field(struct field_writer *writer, uint16_t tag, const void *value, size_t length)
{
    if (writer->overflow || length + FIELD_HEADER_BYTES > writer->capacity - writer->length) {
        writer->overflow = true;
        return;
    }
    uint8_t *at = writer->buffer + writer->length;
    put_u16(at, tag);
    put_u32(at + 2, (uint32_t)length);
    memcpy(at + FIELD_HEADER_BYTES, value, length);
    writer->length += FIELD_HEADER_BYTES + length;
}

void put_text_field(struct field_writer *writer, uint16_t tag, const char *text)
{
    put_field(writer, tag, text, strlen(text) + 1);
}

void put_u8_field(struct field_writer *writer, uint16_t tag, uint8_t value)
{
    put_field(writer, tag, &value, 1);
}

void put_u32_field(struct field_writer *writer, uint16_t tag, uint32_t value)
{
    uint8_t bytes[4];
    put_u32(bytes, value);
    put_field(writer, tag, bytes, sizeof bytes);
}

void put_u64_field(struct field_writer *writer, uint16_t tag, uint64_t value)
{
    uint8_t bytes[8];
    put_u64(bytes, value);
    put_field(writer, tag, bytes, sizeof bytes);
}
