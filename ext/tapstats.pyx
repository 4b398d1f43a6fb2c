# cython: language_level=3, boundscheck=False, wraparound=False
"""Counters of all links in one netlink dump, requested and parsed without the GIL.

RTM_GETSTATS with a filter for IFLA_STATS_LINK_64 answers with the index and the 64-bit counters of
each link and nothing else: 12 datagrams for 500 TAPs. Objects are made only at the end, one tuple per link.

The readable twin and test oracle is hypeman/_native/tapstats_py.py; both answer alike, also for
malformed datagrams. Measured numbers are in ext/README.md.
"""

import os
import socket

from cpython.mem cimport PyMem_RawFree, PyMem_RawRealloc
from libc.errno cimport EINTR, ENOMEM, errno
from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

cdef extern from "<sys/socket.h>" nogil:
    ssize_t send(int fd, const void *data, size_t size, int flags)
    ssize_t recv(int fd, void *data, size_t size, int flags)

cdef enum:
    GET_STATS = 94
    REQUEST_DUMP = 0x301
    DONE = 3
    FAILED = 2
    LINK_64 = 1
    RECEIVE = 65536
    HEADER = 16  # nlmsghdr
    STATS_HEADER = 12  # if_stats_msg

cdef struct Row:
    uint32_t index
    uint64_t received
    uint64_t sent

cdef struct Rows:
    Row *items
    size_t count
    size_t room

cdef struct Request:
    uint32_t length
    uint16_t type
    uint16_t flags
    uint32_t sequence
    uint32_t port
    uint32_t family
    uint32_t index
    uint32_t filter


cdef int append(Rows *rows, Row row) noexcept nogil:
    """0, or ENOMEM."""
    cdef size_t room
    cdef Row *items
    if rows.count == rows.room:
        room = rows.room * 2 if rows.room else 512
        items = <Row *>PyMem_RawRealloc(rows.items, room * sizeof(Row))
        if items == NULL:
            return ENOMEM
        rows.items = items
        rows.room = room
    rows.items[rows.count] = row
    rows.count += 1
    return 0


cdef int parse_link(const unsigned char *data, size_t offset, size_t end, Rows *rows) noexcept nogil:
    """The attributes of one link, from its if_stats_msg at ``offset`` on."""
    cdef uint16_t length, kind
    cdef Row row
    memcpy(&row.index, data + offset + 4, 4)
    offset += STATS_HEADER
    while offset + 4 <= end:
        memcpy(&length, data + offset, 2)
        memcpy(&kind, data + offset + 2, 2)
        if length < 4 or offset + length > end:
            return 0
        if kind == LINK_64 and length >= 4 + 32:
            memcpy(&row.received, data + offset + 4 + 16, 8)  # after rx_packets, tx_packets
            memcpy(&row.sent, data + offset + 4 + 24, 8)
            if append(rows, row):
                return ENOMEM
        offset += (<size_t>length + 3) & ~<size_t>3
    return 0


cdef int parse(const unsigned char *data, size_t size, Rows *rows, bint *last) noexcept nogil:
    """One datagram. 0 or an errno; ``last`` tells whether the dump ends with it."""
    cdef size_t offset = 0
    cdef uint32_t length
    cdef uint16_t kind
    cdef int32_t code
    last[0] = True
    while offset + HEADER <= size:
        memcpy(&length, data + offset, 4)
        memcpy(&kind, data + offset + 4, 2)
        if length < HEADER or offset + length > size:
            return 0
        if kind == DONE or kind == FAILED:  # both carry 0 or a negative errno
            code = 0
            if length >= HEADER + 4:
                memcpy(&code, data + offset + HEADER, 4)
            return -code if -4096 < code < 0 else 0
        if length >= HEADER + STATS_HEADER and parse_link(data, offset + HEADER, offset + length, rows):
            return ENOMEM
        offset += (<size_t>length + 3) & ~<size_t>3
    last[0] = False
    return 0


cdef int sweep_into(int fd, unsigned char *buffer, Rows *rows) noexcept nogil:
    """0 or an errno."""
    cdef Request request
    cdef ssize_t got
    cdef bint last = False
    cdef int failure
    memset(&request, 0, sizeof(request))
    request.length = sizeof(request)
    request.type = GET_STATS
    request.flags = REQUEST_DUMP
    request.filter = 1 << (LINK_64 - 1)
    if send(fd, &request, sizeof(request), 0) < 0:
        return errno
    while not last:
        got = recv(fd, buffer, RECEIVE, 0)
        if got < 0:
            if errno == EINTR:
                continue
            return errno
        failure = parse(buffer, <size_t>got, rows, &last)
        if failure:
            return failure
    return 0


cdef list rows_to_list(Rows *rows):
    cdef size_t i
    return [(rows.items[i].index, rows.items[i].received, rows.items[i].sent) for i in range(rows.count)]


cdef raise_os_error(int number):
    raise OSError(number, os.strerror(number))


cdef class TapStats:
    """A socket and a buffer kept for the sweeps. One thread at a time."""

    cdef object sock
    cdef Rows rows
    cdef unsigned char *buffer

    def __cinit__(self):
        self.buffer = <unsigned char *>PyMem_RawRealloc(NULL, RECEIVE)
        if self.buffer == NULL:
            raise MemoryError

    def __init__(self):
        self.sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)

    def __dealloc__(self):
        PyMem_RawFree(self.rows.items)
        PyMem_RawFree(self.buffer)

    def close(self):
        self.sock.close()

    def sweep(self):
        """(index, bytes received, bytes sent) of every link, as the host counts them. Raises OSError."""
        cdef int fd = self.sock.fileno()
        cdef int failure
        self.rows.count = 0
        with nogil:
            failure = sweep_into(fd, self.buffer, &self.rows)
        if failure:
            raise_os_error(failure)
        return rows_to_list(&self.rows)


def parse_stats(const unsigned char[:] data, list found):
    """Append what one datagram holds to ``found``; whether it was the last one. For tests and fuzzing."""
    cdef Rows rows
    cdef bint last = False
    cdef int failure = 0
    memset(&rows, 0, sizeof(rows))
    try:
        if data.shape[0]:
            failure = parse(&data[0], <size_t>data.shape[0], &rows, &last)
        found.extend(rows_to_list(&rows))
        if failure:
            raise_os_error(failure)
        return bool(last)
    finally:
        PyMem_RawFree(rows.items)
