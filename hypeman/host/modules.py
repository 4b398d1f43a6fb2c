"""Kernel modules that are loaded for us, unloaded again when the appliance is removed.

The package's scripts write the names of all modules that are loaded before the first installation. What of ours is
loaded at removal and was not then goes, unless something uses it by now.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

LOADED_AT_INSTALLATION = ("tun", "kvm_intel", "kvm_amd", "kvm", "vhost_net", "vhost_vsock", "vfio_pci", "erofs")
"""As in systemd/modules-load.conf."""

LOADED_ON_DEMAND = (
    "vhost", "vhost_iotlb", "vsock", "vmw_vsock_virtio_transport_common", "tap", "irqbypass",
    "vfio_pci_core", "vfio_iommu_type1", "vfio", "mdev",
    "ifb", "sch_tbf", "sch_ingress", "cls_u32", "act_mirred",
    "nft_chain_nat", "nft_masq", "nft_nat", "nft_reject_inet", "nft_reject_ipv4", "nft_reject_ipv6", "nft_reject",
    "nft_fib_inet", "nft_fib_ipv4", "nft_fib_ipv6", "nft_fib", "nft_ct", "nft_limit", "nft_log",
    "nf_reject_ipv4", "nf_reject_ipv6", "nf_tables", "nf_conntrack_netlink", "nf_nat", "nf_conntrack",
    "nf_defrag_ipv4", "nf_defrag_ipv6", "nfnetlink",
)  # fmt: skip
"""What the kernel loads by itself for the links, rules and devices of guests."""


def unload_ours(before: Path, loaded: Path = Path("/proc/modules"), command: str = "rmmod") -> tuple[str, ...]:
    """Unload our modules that are not in ``before`` (a name a line) and are unused; those that were unloaded.

    A no-op without that file. Blocking.
    """
    try:
        kept = set(before.read_text().split())
    except OSError:
        return ()
    unloaded: list[str] = []
    while True:
        unused = _unused(loaded)
        names = [
            name for name in (*LOADED_AT_INSTALLATION, *LOADED_ON_DEMAND)
            if name in unused and name not in kept and name not in unloaded
        ]  # fmt: skip
        gone = [name for name in names if _succeeds([command, name])]
        unloaded += gone
        if not gone:
            return tuple(unloaded)


def _unused(loaded: Path) -> set[str]:
    """Modules that nothing uses. A module that another one uses becomes unused when that one goes."""
    rows = [line.split() for line in loaded.read_text().splitlines()]
    return {row[0] for row in rows if len(row) > 2 and row[2] == "0"}


def _succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
