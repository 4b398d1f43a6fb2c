"""Network facts for ``hypeman doctor``. Read-only."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import msgspec

from hypeman.host.files import HostError
from hypeman.host.links import Uplink, find_uplink_now
from hypeman.host.types import TAP_PREFIX

SECONDS = 10.0
"""For a program to tell about the host."""
_CAP_NET_ADMIN = 12
_MAIN_TABLE = 254
_MODULES = ("tun", "ifb", "sch_tbf", "sch_ingress", "cls_u32", "act_mirred", "nf_tables", "nft_masq",
            "nft_fib_inet", "nft_socket")  # fmt: skip


class NetworkFacts(msgspec.Struct, frozen=True):
    tun: bool
    privileged: bool
    """We hold CAP_NET_ADMIN."""
    nft: str
    """Version of the nft program; empty: not installed."""
    uplink: Uplink
    forwarding: dict[str, bool]
    """Uplink → whether packets that come in by it are forwarded."""
    switchable: bool
    """/proc/sys/net can be written, so that the server can switch that on."""
    routes: tuple[tuple[str, str], ...]
    """(interface, network) of the host's own routes, the default route apart."""
    ruleset: list[dict[str, Any]] | None
    """nft's objects; None where they could not be listed."""
    legacy_rules: str
    """Output of ``iptables-legacy -S`` where such rules exist: nft does not see them."""
    missing_modules: tuple[str, ...]
    """Kernel modules that this kernel's packages do not have; empty if that cannot be determined."""


def gather(uplink: str = "") -> NetworkFacts:
    """Blocking; some 50 ms. Raises HostError."""
    found = find_uplink_now(uplink)
    return NetworkFacts(
        tun=Path("/dev/net/tun").exists(),
        privileged=_privileged(Path("/proc/self/status").read_text()),
        nft=_output(["nft", "--version"]).strip(),
        uplink=found,
        forwarding={name: _forwards(name) for name in found.names},
        switchable=os.access("/proc/sys/net/ipv4/ip_forward", os.W_OK),
        routes=read_routes(),
        ruleset=_ruleset(),
        legacy_rules=_output(["iptables-legacy", "-S"]) if _has_legacy_filter() else "",
        missing_modules=_missing_modules(),
    )


def read_routes() -> tuple[tuple[str, str], ...]:
    """Interface and network of each IPv4 route of the main table but default routes and our own.

    Uses pyroute2, which covers all kinds of routes. It takes 0.3 s to import, which is acceptable for
    ``doctor``; code on the path of a create uses ``netlink.py``.
    """
    from pyroute2 import IPRoute

    with IPRoute() as netlink:
        names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in netlink.get_links()}
        return tuple(
            (name, f"{route.get_attr('RTA_DST')}/{route['dst_len']}")
            for route in netlink.get_routes(family=socket.AF_INET, table=_MAIN_TABLE)
            if route["dst_len"]
            and (name := names.get(route.get_attr("RTA_OIF"), ""))
            and not name.startswith(TAP_PREFIX)
        )


def _privileged(status: str) -> bool:
    line = next((line for line in status.splitlines() if line.startswith("CapEff:")), "CapEff: 0")
    return bool(int(line.split()[1], 16) >> _CAP_NET_ADMIN & 1)


def _forwards(name: str) -> bool:
    try:
        return Path(f"/proc/sys/net/ipv4/conf/{name}/forwarding").read_text().strip() == "1"
    except OSError:
        return False


def _has_legacy_filter() -> bool:
    try:
        return "filter" in Path("/proc/net/ip_tables_names").read_text().split()
    except OSError:
        return False


def _ruleset() -> list[dict[str, Any]] | None:
    text = _output(["nft", "-j", "-nn", "list", "ruleset"])
    try:
        objects: list[dict[str, Any]] = json.loads(text)["nftables"]
    except (ValueError, KeyError, TypeError):
        return None
    return objects


def _missing_modules() -> tuple[str, ...]:
    root = Path("/lib/modules", os.uname().release)
    try:
        known = (root / "modules.dep").read_text() + (root / "modules.builtin").read_text()
    except OSError:
        return ()
    return tuple(name for name in _MODULES if f"/{name}.ko" not in known)


def _output(command: list[str]) -> str:
    """Empty if the program is not there or fails. Raises HostError."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stdout
    except subprocess.TimeoutExpired:
        raise HostError(f"{' '.join(command)} did not end within {SECONDS:g} s") from None
    except (OSError, subprocess.CalledProcessError):
        return ""
