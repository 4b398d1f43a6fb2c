"""Changes and watches our nftables tables.

The fixed part is text and is loaded by the ``nft`` program (about 20 ms, at start and after a flush).
Elements, which change with every instance, use our own netlink transactions: 0.1 ms and no process,
compared with 15 to 25 ms for ``nft``.

Formats: include/uapi/linux/netfilter/nf_tables.h (a batch is a transaction), nfnetlink_conntrack.h.
"""

from __future__ import annotations

import errno
import socket
import struct
import subprocess
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from ipaddress import IPv4Address

import trio

from hypeman.host.files import HostError
from hypeman.host.netlink import (
    CREATE,
    NETLINK_NETFILTER,
    Message,
    Monitor,
    Netlink,
    NetlinkError,
    Packet,
    attr,
    attributes,
    nested,
    text,
    u32,
)
from hypeman.host.types import TABLE, Element

_SUBSYSTEM = 10
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_NEW_ELEMENT, _DEL_ELEMENT = _SUBSYSTEM << 8 | 12, _SUBSYSTEM << 8 | 14
_NEW_GENERATION = _SUBSYSTEM << 8 | 15
_ELEMENTS_TABLE, _ELEMENTS_SET, _ELEMENTS_LIST = 1, 2, 3
_LIST_ELEMENT, _ELEMENT_KEY, _DATA_VALUE = 1, 1, 1
_GROUP_NFTABLES = 7
_GET_FLOWS, _DELETE_FLOWS = 1 << 8 | 1, 1 << 8 | 2
_TUPLE_ORIGINAL, _TUPLE_REPLY, _FLOW_NUMBER, _FLOW_ZONE, _FILTER = 1, 2, 12, 18, 25
_TUPLE_IP, _IPV4_SOURCE = 1, 1
_ORIGINAL_FLAGS, _REPLY_FLAGS, _SELECT_SOURCE = 1, 2, 1
_FAMILY = {"inet": 1, "arp": 3}
_TABLE_NAME = 1
"""The first attribute of tables, chains, rules, sets and elements."""


class RulesMissing(HostError):
    """``nft`` is not installed."""


class Rules:
    """All changes to nftables. Only our two tables are ever changed."""

    def __init__(self) -> None:
        self._netlink = Netlink(NETLINK_NETFILTER)
        self._nft_pids: deque[int] = deque(maxlen=8)
        self._one_at_a_time = trio.CapacityLimiter(1)

    def close(self) -> None:
        self._netlink.close()

    async def load(self, ruleset: str) -> None:
        """Load a ruleset in nft syntax as one transaction. Raises HostError with nft's error output."""
        await trio.to_thread.run_sync(self._load, ruleset, limiter=self._one_at_a_time)

    async def change(self, *, remove: Iterable[Element] = (), add: Iterable[Element] = ()) -> None:
        """Remove and add elements atomically. Removing missing and adding existing elements is a no-op."""
        messages = _change_messages(tuple(remove), tuple(add))
        if messages:
            await trio.to_thread.run_sync(
                self._netlink.run_transaction,
                _batch(_BATCH_BEGIN), messages, _batch(_BATCH_END), limiter=self._one_at_a_time,
            )  # fmt: skip

    async def forget_flows(self, address: str) -> None:
        """Delete conntrack entries of connections from and to ``address``. Raises NetlinkError."""
        await trio.to_thread.run_sync(self._forget, IPv4Address(address), limiter=self._one_at_a_time)

    async def watch_foreign_changes(self) -> AsyncGenerator[None, None]:
        """Yields when another program changed one of our tables, or may have; close it with ``aclosing``."""
        monitor = Monitor(NETLINK_NETFILTER, (_GROUP_NFTABLES,))
        try:
            while True:
                await monitor.receive(self._foreign, True)
                yield
        finally:
            monitor.close()

    def _foreign(self, packet: Packet) -> bool | None:
        """True for a change of our tables by another program."""
        ours = packet.type != _NEW_GENERATION and _names_our_table(packet.body)
        return True if ours and packet.port not in (self._netlink.port, *self._nft_pids) else None

    def _forget(self, address: IPv4Address) -> None:
        try:
            self._forget_selected(address)
        except NetlinkError as error:
            if error.errno != errno.EINVAL:
                raise
            self._forget_one_by_one(address)

    def _forget_selected(self, address: IPv4Address) -> None:
        self._netlink.run([Message(_DELETE_FLOWS, 0, *each, (errno.ENOENT,)) for each in _selections(address)])

    def _forget_one_by_one(self, address: IPv4Address) -> None:
        """For kernels that filter only dumps, not deletions, such as Debian 12's 6.1."""
        listed = [self._netlink.dump(Message(_GET_FLOWS, 0, *each)) for each in _selections(address)]
        self._netlink.run([_delete_message(packet) for packets in listed for packet in packets])

    def _load(self, ruleset: str) -> None:
        _nft(["-f", "-"], ruleset, self._nft_pids)


def _nft(arguments: list[str], text_in: str, pids: deque[int]) -> str:
    """Run ``nft``. It binds its socket to its process id, which distinguishes its changes from foreign ones."""
    try:
        process = subprocess.Popen(
            ["nft", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    except FileNotFoundError:
        raise RulesMissing("the nft program is not installed; type: apt-get install nftables") from None
    pids.append(process.pid)
    output, complaint = process.communicate(text_in)
    if process.returncode != 0:
        raise HostError(f"nft refused: {complaint.strip()[:2000]}")
    return output


def _names_our_table(body: bytes) -> bool:
    names = (value for kind, value in attributes(body, 4) if kind == _TABLE_NAME)
    return next(names, b"").rstrip(b"\0") == TABLE.encode()


def _batch(kind: int) -> Message:
    return Message(kind, 0, struct.pack("=BB", 0, 0) + struct.pack(">H", _SUBSYSTEM), "nftables transaction")


def _change_messages(remove: tuple[Element, ...], add: tuple[Element, ...]) -> list[Message]:
    """A removal is preceded by an addition, since removing a missing element fails the transaction."""
    return [
        *(_element_message(_NEW_ELEMENT, CREATE, element) for element in remove),
        *(_element_message(_DEL_ELEMENT, 0, element) for element in remove),
        *(_element_message(_NEW_ELEMENT, CREATE, element) for element in add),
    ]


def _selections(address: IPv4Address) -> list[tuple[bytes, str]]:
    """Message body and name for the flows that ``address`` started, and for those that it answers."""
    source = nested(_TUPLE_IP, attr(_IPV4_SOURCE, address.packed))
    header = struct.pack("=BBH", socket.AF_INET, 0, 0)
    return [
        (
            header + nested(tuple_kind, source) + nested(_FILTER, u32(flags_kind, _SELECT_SOURCE)),
            f"forget connections of {address}",
        )
        for tuple_kind, flags_kind in ((_TUPLE_ORIGINAL, _ORIGINAL_FLAGS), (_TUPLE_REPLY, _REPLY_FLAGS))
    ]


def _delete_message(flow: Packet) -> Message:
    """Includes the flow's id, so that a later flow between the same endpoints is not deleted."""
    told = dict(attributes(flow.body, 4))
    body = flow.body[:4] + nested(_TUPLE_ORIGINAL, told[_TUPLE_ORIGINAL])
    body += b"".join(attr(kind, told[kind]) for kind in (_FLOW_NUMBER, _FLOW_ZONE) if kind in told)
    return Message(_DELETE_FLOWS, 0, body, "forget a connection", (errno.ENOENT,))


def _element_message(kind: int, flags: int, element: Element) -> Message:
    key = nested(_ELEMENT_KEY, attr(_DATA_VALUE, encode_key(element)))
    body = struct.pack("=BBH", _FAMILY[element.family], 0, 0)
    body += text(_ELEMENTS_TABLE, TABLE) + text(_ELEMENTS_SET, element.set)
    body += nested(_ELEMENTS_LIST, nested(_LIST_ELEMENT, key))
    return Message(kind, flags, body, f"change element {element}")


def encode_key(element: Element) -> bytes:
    """The key in the kernel's format: each part padded to four bytes, interface names to 16."""
    name, *identity = element.key
    key = name.encode().ljust(16, b"\0")
    if identity:
        mac, address = identity
        key += bytes.fromhex(mac.replace(":", "")).ljust(8, b"\0") + IPv4Address(address).packed
    return key
