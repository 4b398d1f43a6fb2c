"""Control groups: the limits as data, and making and removing on a real hierarchy where there is one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypeman.host.cgroups import CGroups, render_limits

MiB = 1024 * 1024
GiB = 1024 * MiB


def test_a_vm_gets_what_it_was_promised_and_room_for_its_vmm() -> None:
    limits = render_limits(2, 8 * GiB)
    assert limits["cpu.max"] == "250000 100000"
    assert int(limits["memory.max"]) == 8 * GiB + 512 * MiB
    assert int(render_limits(1, 128 * MiB)["memory.max"]) == 384 * MiB


def test_the_weight_stays_in_the_kernels_bounds() -> None:
    assert render_limits(1, GiB)["cpu.weight"] == "100"
    assert render_limits(500, GiB)["cpu.weight"] == "10000"


def test_without_groups_everything_is_content() -> None:
    groups = CGroups(None)
    assert groups.make("a", vcpus=1, memory=GiB) == ""
    assert groups.remove("a")
    assert groups.remove_strays([]) == []


@pytest.fixture
def groups() -> Iterator[CGroups]:
    """Groups below a directory of our own in the host's cgroup v2 hierarchy."""
    for mount in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        if (mount / "cgroup.controllers").exists() and os.access(mount, os.W_OK):
            break
    else:
        pytest.skip("no cgroup v2 hierarchy that we may write to")
    root = mount / f"hypeman-test-{os.getpid()}"
    try:
        root.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error.strerror}")
    yield CGroups(root)
    for entry in root.iterdir():
        if entry.is_dir():
            entry.rmdir()
    root.rmdir()


@pytest.mark.real
def test_a_group_is_removed_after_its_last_process(groups: CGroups) -> None:
    group = groups.make("vm1", vcpus=1, memory=GiB)
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as process:
        Path(group, "cgroup.procs").write_text(str(process.pid))
        assert not groups.remove("vm1")
    assert groups.remove("vm1")
    assert not Path(group).exists()
    assert groups.remove("vm1"), "removing what is gone is fine"


@pytest.mark.real
def test_making_twice_is_making_once(groups: CGroups) -> None:
    assert groups.make("vm1", vcpus=1, memory=GiB) == groups.make("vm1", vcpus=2, memory=2 * GiB)


@pytest.mark.real
def test_strays_go_and_known_ones_stay(groups: CGroups) -> None:
    for name in ("vm1", "vm2", "vm3"):
        groups.make(name, vcpus=1, memory=GiB)
    assert groups.remove_strays({"vm2"}) == ["vm1", "vm3"]
    assert groups.remove("vm2")
