"""Labels of images and tags of instances that change the guest: what they mean, and what is refused by name."""

from __future__ import annotations

import re
import resource

import pytest

from hypeman.errors import InvalidRequest
from hypeman.guest.boot import UNLIMITED, Pid1, Ulimit
from hypeman.guest.settings import GuestSettings, parse_settings


def test_none() -> None:
    assert parse_settings({}, {}) == parse_settings({"team": "a", "hypeman.compose.name": "x"}) == GuestSettings()


def test_all() -> None:
    settings = parse_settings(
        {
            "hypeman.pid1": "true",
            "hypeman.shm-size": "1GB",
            "hypeman.volumes": "/var/lib/docker /srv",
            "hypeman.ulimit.nofile": "1024:65536",
            "hypeman.ulimit.core": "-1",
            "hypeman.ulimit.memlock": "0:unlimited",
            "hypeman.sysctl.net.core.somaxconn": "65535",
            "hypeman.sysctl.net.ipv4.ip_local_port_range": "1024 65000",
        }
    )
    assert settings.pid1 is Pid1.WORKLOAD and settings.shm_bytes == 1 << 30
    assert settings.volume_dirs == ("/var/lib/docker", "/srv")
    assert set(settings.ulimits) == {
        Ulimit(resource.RLIMIT_NOFILE, 1024, 65536),
        Ulimit(resource.RLIMIT_CORE, UNLIMITED, UNLIMITED),
        Ulimit(resource.RLIMIT_MEMLOCK, 0, UNLIMITED),
    }
    assert settings.sysctls == ("net.core.somaxconn=65535", "net.ipv4.ip_local_port_range=1024 65000")


@pytest.mark.parametrize("name", ["core", "cpu", "data", "fsize", "memlock", "msgqueue", "nice", "nofile", "nproc"])
def test_numbers_are_the_kernels(name: str) -> None:
    [limit] = parse_settings({f"hypeman.ulimit.{name}": "3"}).ulimits
    assert limit == Ulimit(getattr(resource, f"RLIMIT_{name.upper()}"), 3, 3)


def test_a_tag_wins_over_a_label() -> None:
    labels = {"hypeman.pid1": "true", "hypeman.shm-size": "1GB"}
    assert parse_settings({"hypeman.pid1": "false"}, labels) == GuestSettings(pid1=Pid1.AGENT, shm_bytes=1 << 30)


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        ("hypeman.pid1", "maybe"),
        ("hypeman.volumes", "data"),
        ("hypeman.volumes", "/a /"),
        ("hypeman.volumes", "/a/../../b"),
        ("hypeman.volumes", "/proc/x"),
        ("hypeman.shm-size", "big"),
        ("hypeman.shm-size", "1KB"),
        ("hypeman.ulimit.files", "1"),
        ("hypeman.ulimit.nofile", ""),
        ("hypeman.ulimit.nofile", "10:1"),
        ("hypeman.ulimit.nofile", "1:2:3"),
        ("hypeman.ulimit.nofile", "unlimited:1"),
        ("hypeman.ulimit.nofile", "9" * 30),
        ("hypeman.sysctl.", "1"),
        ("hypeman.sysctl.vm", "1"),
        ("hypeman.sysctl.vm.a=b", "1"),
        ("hypeman.sysctl.../etc", "1"),
        ("hypeman.sysctl.net/../x", "1"),
    ],
)
def test_refused_by_name(tag: str, value: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^tag {re.escape(tag)}: "):
        parse_settings({tag: value})
    with pytest.raises(InvalidRequest, match=f"^the image's label {re.escape(tag)}: "):
        parse_settings({}, {tag: value})
    with pytest.raises(InvalidRequest, match="at most 64"):
        parse_settings({f"hypeman.sysctl.vm.a{number}": "1" for number in range(65)})
