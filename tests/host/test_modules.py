"""Modules that were loaded for us go at removal; what others loaded, or use, stays."""

from __future__ import annotations

from pathlib import Path

from hypeman.host.modules import LOADED_AT_INSTALLATION, unload_ours

ROOT = Path(__file__).parents[2]
RMMOD = """#!/bin/sh
grep -q "^$1 [0-9]* 0 " {loaded} || exit 1
sed -i "/^$1 /d; s/^\\([a-z_]* [0-9]*\\) 1 $1, /\\1 0 - /" {loaded}
"""
"""As the kernel does it: only what is unused; what it used may then be unused, too."""


def test_ours_go_in_the_order_of_their_use(tmp_path: Path) -> None:
    loaded, before, rmmod = tmp_path / "modules", tmp_path / "before", tmp_path / "rmmod"
    rows = (
        "nf_tables 300000 1 nft_masq, Live", "nft_masq 16384 0 - Live", "tun 60000 0 - Live", "ext4 9000 2 - Live",
        "kvm 9000 1 kvm_intel, Live", "kvm_intel 9000 3 - Live", "ifb 12288 0 - Live", "dummy 12288 0 - Live",
    )  # fmt: skip
    loaded.write_text("\n".join(f"{row} 0x0" for row in rows) + "\n")
    rmmod.write_text(RMMOD.format(loaded=loaded))
    rmmod.chmod(0o755)
    assert unload_ours(before, loaded, str(rmmod)) == ()
    before.write_text("ext4\ntun\n")
    assert unload_ours(before, loaded, str(rmmod)) == ("ifb", "nft_masq", "nf_tables")
    assert [line.split()[0] for line in loaded.read_text().splitlines()] == ["tun", "ext4", "kvm", "kvm_intel", "dummy"]


def test_all_that_the_package_loads_is_known() -> None:
    lines = (ROOT / "systemd/modules-load.conf").read_text().splitlines()
    assert {line for line in lines if line and not line.startswith("#")} == set(LOADED_AT_INSTALLATION)


def test_the_scripts_write_down_what_is_loaded_before_they_load() -> None:
    for script in ("debian/postinst", "install.sh"):
        text = (ROOT / "packaging/appliance" / script).read_text()
        assert (
            0
            < text.index("/proc/modules > /etc/hypeman/modules-before")
            < text.index('modules-load.conf"\n' if script == "install.sh" else "systemd-modules-load hypeman.conf")
        )
        assert "ip_forward" not in text
