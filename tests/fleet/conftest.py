"""One fleet for all tests of this folder: a control plane and three hosts, of which the third has real VMs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.fleet import build
from tests.fleet.control import ControlPlane
from tests.fleet.fleet import Fleet
from tests.fleet.hosts import Host
from tests.real.appliance import check_host, short_directory


def check_fleet() -> None:
    """Skip, saying why, where it cannot run."""
    if os.geteuid() != 0:
        pytest.skip("a fleet needs root (namespaces)")
    if reason := build.missing():
        pytest.skip(reason)
    check_host()


@pytest.fixture(scope="session")
def fleet() -> Iterator[Fleet]:
    check_fleet()
    for directory in short_directory("fleet"):
        directory.chmod(0o755)
        control = ControlPlane(directory)
        hosts: list[Host] = []
        try:
            control.start()
            hosts += [Host(control, directory, number, real=number == 3) for number in (1, 2, 3)]
            fleet = Fleet(control, hosts)
            fleet.start()
            yield fleet
        finally:
            for host in hosts:
                host.close()
            control.close()
