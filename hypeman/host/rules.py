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
from collections.abc import AsyncGenerator, Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network

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
from hypeman.host.types import INTERVAL_SETS, MAP_TYPES, SET_TYPES, TABLE, Element

_SUBSYSTEM = 10
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_NEW_ELEMENT, _DEL_ELEMENT = _SUBSYSTEM << 8 | 12, _SUBSYSTEM << 8 | 14
_NEW_GENERATION = _SUBSYSTEM << 8 | 15
_ELEMENTS_TABLE, _ELEMENTS_SET, _ELEMENTS_LIST = 1, 2, 3
_LIST_ELEMENT, _ELEMENT_KEY, _ELEMENT_DATA, _ELEMENT_KEY_END, _DATA_VALUE = 1, 1, 2, 10, 1
_ELEMENTS_PER_MESSAGE = 400
"""The list of elements is one attribute, whose length has 16 bits."""
_LENGTHS = {"inet_service": 2, "inet_proto": 1, "ether_addr": 6}
"""Bytes of a key that is not padded, because it is the only component."""
_PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
_GROUP_NFTABLES = 7
_GET_FLOWS, _DELETE_FLOWS = 1 << 8 | 1, 1 << 8 | 2
_TUPLE_ORIGINAL, _TUPLE_REPLY, _FLOW_NUMBER, _FLOW_ZONE, _FILTER = 1, 2, 12, 18, 25
_TUPLE_IP, _IPV4_SOURCE = 1, 1
_TUPLE_PROTO, _PROTO_NUMBER, _PROTO_DESTINATION = 2, 1, 3
_FLOW_STATUS, _DESTINATION_TRANSLATED = 3, 1 << 5
_ORIGINAL_FLAGS, _REPLY_FLAGS, _SELECT_SOURCE, _SELECT_PROTOCOL = 1, 2, 1, 1 << 3
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

    async def forget_translated_flows(self, address: str, ports: Iterable[tuple[str, int]]) -> None:
        """Delete conntrack entries of connections to ``address`` that came in through one of ``ports`` (protocol and
        number) of the host. Raises NetlinkError."""
        await trio.to_thread.run_sync(
            self._forget_translated, IPv4Address(address), frozenset(ports), limiter=self._one_at_a_time
        )

    async def forget_untranslated_flows(self, ports: Iterable[tuple[str, int]]) -> None:
        """Delete conntrack entries of UDP flows to one of ``ports`` that are not translated. Raises NetlinkError."""
        await trio.to_thread.run_sync(self._forget_untranslated, frozenset(ports), limiter=self._one_at_a_time)

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
        self._netlink.run(
            [Message(_DELETE_FLOWS, 0, *selection, (errno.ENOENT,)) for selection in _selections(address)]
        )

    def _forget_one_by_one(self, address: IPv4Address) -> None:
        """For kernels that filter only dumps, not deletions, such as Debian 12's 6.1."""
        listed = [self._netlink.dump(Message(_GET_FLOWS, 0, *selection)) for selection in _selections(address)]
        self._netlink.run([_delete_message(packet) for packets in listed for packet in packets])

    def _forget_translated(self, address: IPv4Address, ports: frozenset[tuple[str, int]]) -> None:
        answered = self._netlink.dump(Message(_GET_FLOWS, 0, *_selections(address)[1]))
        gone = [flow for flow in answered if _is_translated(flow) and _destination(flow) in ports]
        self._netlink.run([_delete_message(flow) for flow in gone])

    def _forget_untranslated(self, ports: frozenset[tuple[str, int]]) -> None:
        gone = [flow for flow in self._udp_flows() if not _is_translated(flow) and _destination(flow) in ports]
        self._netlink.run([_delete_message(flow) for flow in gone])

    def _udp_flows(self) -> list[Packet]:
        header = struct.pack("=BBH", socket.AF_INET, 0, 0)
        udp = nested(_TUPLE_ORIGINAL, nested(_TUPLE_PROTO, attr(_PROTO_NUMBER, bytes([socket.IPPROTO_UDP]))))
        udp += nested(_FILTER, u32(_ORIGINAL_FLAGS, _SELECT_PROTOCOL))
        try:
            return self._netlink.dump(Message(_GET_FLOWS, 0, header + udp, "list UDP flows"))
        except NetlinkError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            return self._netlink.dump(Message(_GET_FLOWS, 0, header, "list flows"))

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
        *_element_messages(_NEW_ELEMENT, CREATE, remove),
        *_element_messages(_DEL_ELEMENT, 0, remove),
        *_element_messages(_NEW_ELEMENT, CREATE, add),
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


def _is_translated(flow: Packet) -> bool:
    status = dict(attributes(flow.body, 4)).get(_FLOW_STATUS, b"")
    return len(status) == 4 and bool(int.from_bytes(status, "big") & _DESTINATION_TRANSLATED)


def _destination(flow: Packet) -> tuple[str, int]:
    """Protocol and port that the flow was sent to; ("", 0) for protocols without ports."""
    original = dict(attributes(flow.body, 4)).get(_TUPLE_ORIGINAL, b"")
    found = dict(attributes(dict(attributes(original)).get(_TUPLE_PROTO, b"")))
    number, port = found.get(_PROTO_NUMBER, b""), found.get(_PROTO_DESTINATION, b"")
    names = [name for name, known in _PROTOCOLS.items() if number == bytes([known])]
    return (names[0], int.from_bytes(port, "big")) if names else ("", 0)


def _delete_message(flow: Packet) -> Message:
    """Includes the flow's id, so that a later flow between the same endpoints is not deleted."""
    found = dict(attributes(flow.body, 4))
    body = flow.body[:4] + nested(_TUPLE_ORIGINAL, found[_TUPLE_ORIGINAL])
    body += b"".join(attr(kind, found[kind]) for kind in (_FLOW_NUMBER, _FLOW_ZONE) if kind in found)
    return Message(_DELETE_FLOWS, 0, body, "forget a connection", (errno.ENOENT,))


def _element_messages(kind: int, flags: int, elements: tuple[Element, ...]) -> Iterator[Message]:
    """One message for each set, or a few for a set with many elements: each is acknowledged, and what the socket
    receives is bounded."""
    by_set: dict[tuple[str, str], list[Element]] = {}
    for element in elements:
        by_set.setdefault((element.family, element.set), []).append(element)
    for (family, name), members in by_set.items():
        header = struct.pack("=BBH", _FAMILY[family], 0, 0) + text(_ELEMENTS_TABLE, TABLE) + text(_ELEMENTS_SET, name)
        for start in range(0, len(members), _ELEMENTS_PER_MESSAGE):
            part = members[start : start + _ELEMENTS_PER_MESSAGE]
            body = header + nested(_ELEMENTS_LIST, *map(_element, part))
            yield Message(kind, flags, body, f"change element {part[0]}")


def _element(element: Element) -> bytes:
    parts = [nested(_ELEMENT_KEY, attr(_DATA_VALUE, encode_key(element)))]
    if element.set in INTERVAL_SETS:
        parts.append(nested(_ELEMENT_KEY_END, attr(_DATA_VALUE, encode_key(element, end=True))))
    if element.value:
        value = b"".join(map(_encode, MAP_TYPES[element.set], element.value))
        parts.append(nested(_ELEMENT_DATA, attr(_DATA_VALUE, value)))
    return nested(_LIST_ELEMENT, *parts)


def encode_key(element: Element, *, end: bool = False) -> bytes:
    """The key in the kernel's format; of a range its first, or with ``end`` its last."""
    texts = element.key
    if element.set in INTERVAL_SETS:
        texts = tuple(_bounds(kind, text)[end] for kind, text in zip(SET_TYPES[element.set], texts, strict=True))
    types = SET_TYPES[element.set]
    key = b"".join(map(_encode, types, texts))
    return key[: _LENGTHS.get(types[0], len(key))] if len(types) == 1 else key


def _bounds(kind: str, value: str) -> tuple[str, str]:
    if kind == "ipv4_addr":
        network = IPv4Network(value)
        return str(network.network_address), str(network.broadcast_address)
    if kind == "inet_service":
        first, _, last = value.partition("-")
        return first, last or first
    return value, value


def _encode(kind: str, value: str) -> bytes:
    """One component: padded to four bytes, interface names to 16."""
    match kind:
        case "ifname":
            return value.encode().ljust(16, b"\0")
        case "ether_addr":
            return bytes.fromhex(value.replace(":", "")).ljust(8, b"\0")
        case "ipv4_addr":
            return IPv4Address(value).packed
        case "inet_proto":
            return bytes([_PROTOCOLS[value], 0, 0, 0])
        case "inet_service":
            return struct.pack(">H2x", int(value))
        case "mark":
            return struct.pack("=I", int(value))
    raise ValueError(f"no encoding for {kind}")
