# cython: language_level=3, boundscheck=False, wraparound=False
"""XOR of WebSocket payloads with their masking key, eight bytes at a time. Twin of hypeman/_native/wsmask_py.py."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy


cdef void exclusive_or(const uint8_t *source, uint8_t *target, Py_ssize_t size, const uint8_t *key) noexcept nogil:
    """``size`` bytes of ``source`` XOR the eight bytes of ``key``, repeated, to ``target``; both may be the same."""
    cdef uint64_t whole, word
    cdef Py_ssize_t at = 0
    memcpy(&whole, key, 8)
    while at + 8 <= size:
        memcpy(&word, &source[at], 8)
        word ^= whole
        memcpy(&target[at], &word, 8)
        at += 8
    while at < size:
        target[at] = source[at] ^ key[at % 8]
        at += 1


def unmasked(const uint8_t[::1] data, Py_ssize_t begin, Py_ssize_t end, key, Py_ssize_t before):
    """``data[begin:end]`` without its mask; ``before`` bytes of the same payload came earlier."""
    cdef uint8_t repeated[8]
    if not 0 <= begin <= end <= data.shape[0] or len(key) != 4 or before < 0:
        raise ValueError("the range is outside of the data, or the key does not have four bytes")
    for i in range(8):
        repeated[i] = <uint8_t>key[(i + before) % 4]
    result = PyBytes_FromStringAndSize(NULL, end - begin)
    if end > begin:
        exclusive_or(&data[begin], <uint8_t *>PyBytes_AS_STRING(result), end - begin, repeated)
    return result


cdef class Masker:
    """Masks or unmasks a payload that arrives in parts."""

    cdef uint8_t _key[8]

    def __init__(self, masking_key):
        key = bytes(masking_key)
        if len(key) != 4:
            raise ValueError("a masking key has four bytes")
        for i in range(8):
            self._key[i] = <uint8_t>key[i % 4]

    def process(self, data):
        """The next part, masked or unmasked."""
        result = bytearray(data)
        cdef uint8_t[::1] view
        cdef uint8_t rotated[8]
        cdef Py_ssize_t size = len(result)
        if size == 0:
            return result
        view = result
        exclusive_or(&view[0], &view[0], size, self._key)
        for i in range(8):
            rotated[i] = self._key[(i + size) % 4]
        memcpy(self._key, rotated, 8)
        return result
