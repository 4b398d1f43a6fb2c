# cython: language_level=3, boundscheck=False, wraparound=False
"""XOR of WebSocket payloads with their masking key, eight bytes at a time. Twin of hypeman/_native/wsmask_py.py."""

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy


cdef class Masker:
    """Masks or unmasks a payload that comes in parts."""

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
        cdef uint64_t key, word
        cdef Py_ssize_t size = len(result), at = 0
        if size == 0:
            return result
        view = result
        memcpy(&key, self._key, 8)
        with nogil:
            while at + 8 <= size:
                memcpy(&word, &view[at], 8)
                word ^= key
                memcpy(&view[at], &word, 8)
                at += 8
            while at < size:
                view[at] ^= self._key[at % 8]
                at += 1
            for at in range(8):
                rotated[at] = self._key[(at + size) % 4]
            memcpy(self._key, rotated, 8)
        return result
