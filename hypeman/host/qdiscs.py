"""Queueing disciplines that limit a TAP, as netlink messages. Pure.

    download   guest ◄── TAP ◄── TBF                     the TAP's root queue
    upload     guest ──► TAP ──► ingress ─u32, mirred─► ifb ──► TBF ──► back in as from the TAP

u32 and mirred and not matchall, flower or police: the former are in every kernel we met, of the
latter none is in all. Formats: include/uapi/linux/pkt_sched.h, pkt_cls.h, tc_act/tc_mirred.h.
"""

from __future__ import annotations

import errno
import struct

from hypeman.host.netlink import CREATE, EXCL, REPLACE, Message, attr, nested, text, u32
from hypeman.host.types import TokenBucket

_NEW_QDISC, _DEL_QDISC, _NEW_FILTER = 36, 37, 44
_TCA_KIND, _TCA_OPTIONS = 1, 2
_ROOT, _INGRESS, _INGRESS_HANDLE, _ROOT_HANDLE = 0xFFFFFFFF, 0xFFFFFFF1, 0xFFFF0000, 0x00010000
_TBF_PARMS, _TBF_BURST = 1, 6
_U32_SEL, _U32_ACT = 5, 7
_ACT_KIND, _ACT_OPTIONS = 1, 2
_MIRRED_PARMS = 2
_EGRESS_REDIRECT, _TC_ACT_STOLEN = 1, 4
_U32_TERMINAL = 1
_FIRST_U32 = 0x80000800
"""Handle of the first filter: explicit, so that a repeated request replaces it."""
_ETH_P_ALL_BE = 0x0300
_LINKLAYER_ETHERNET = 1
"""Setting it avoids the rate table that kernels before 3.8 needed."""
_NOTHING_THERE = (errno.ENOENT, errno.EINVAL)
"""Kernel errors for removing a queue that is the default one, or missing."""


def download_messages(tap: str, index: int, bucket: TokenBucket | None) -> list[Message]:
    """Limit what ``tap`` sends to the guest, or remove the limit."""
    return [_tbf(tap, index, bucket)] if bucket else [_remove(tap, index, _ROOT)]


def upload_messages(tap: str, index: int, shaper: int, bucket: TokenBucket) -> list[Message]:
    """Limit what the guest sends, through the ifb with index ``shaper``, which is up.

    The ifb's queue is created before the redirection, so no packet ever passes unlimited.
    """
    return [_tbf(tap, shaper, bucket), _ingress(tap, index), _redirect(tap, index, shaper)]


def unlimited_upload_messages(tap: str, index: int) -> list[Message]:
    return [_remove(tap, index, _INGRESS)]


def _tcmsg(index: int, handle: int, parent: int, info: int = 0) -> bytes:
    return struct.pack("=BxxxiIII", 0, index, handle, parent, info)


def _tbf(tap: str, index: int, bucket: TokenBucket) -> Message:
    buffer = ticks(bucket.burst / bucket.rate)
    spec = struct.pack("=BBHhHI", 0, _LINKLAYER_ETHERNET, 0, 0, 0, bucket.rate)
    parms = spec + struct.pack("=BBHhHI", 0, 0, 0, 0, 0, 0) + struct.pack("=III", bucket.queue, buffer, 0)
    options = nested(_TCA_OPTIONS, attr(_TBF_PARMS, parms), u32(_TBF_BURST, bucket.burst))
    body = _tcmsg(index, _ROOT_HANDLE, _ROOT) + text(_TCA_KIND, "tbf") + options
    return Message(_NEW_QDISC, CREATE | REPLACE, body, f"limit {tap} to {bucket.rate} B/s")


def _ingress(tap: str, index: int) -> Message:
    body = _tcmsg(index, _INGRESS_HANDLE, _INGRESS) + text(_TCA_KIND, "ingress")
    return Message(_NEW_QDISC, CREATE | EXCL, body, f"watch what {tap} receives", (errno.EEXIST,))


def _redirect(tap: str, index: int, shaper: int) -> Message:
    action = struct.pack("=IIiiiiI", 0, 0, _TC_ACT_STOLEN, 0, 0, _EGRESS_REDIRECT, shaper)
    actions = nested(1, text(_ACT_KIND, "mirred"), nested(_ACT_OPTIONS, attr(_MIRRED_PARMS, action)))
    everything = struct.pack("=BBBxHHhhI", _U32_TERMINAL, 0, 1, 0, 0, 0, 0, 0) + struct.pack("=IIii", 0, 0, 0, 0)
    options = nested(_TCA_OPTIONS, attr(_U32_SEL, everything), nested(_U32_ACT, actions))
    body = _tcmsg(index, _FIRST_U32, _INGRESS_HANDLE, 1 << 16 | _ETH_P_ALL_BE) + text(_TCA_KIND, "u32") + options
    return Message(_NEW_FILTER, CREATE | REPLACE, body, f"redirect what {tap} receives to its shaper")


def _remove(tap: str, index: int, parent: int) -> Message:
    body = _tcmsg(index, 0, parent)
    return Message(_DEL_QDISC, 0, body, f"lift the limit of {tap}", _NOTHING_THERE)


def ticks(seconds: float) -> int:
    """A time in the unit of the packet schedulers: 64 ns, whatever the machine (PSCHED_SHIFT is 6)."""
    return min(int(seconds * 1e9) >> 6, 2**32 - 1)
