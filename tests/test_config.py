"""Environment over file over default; unknown keys are refused by name; every key is read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

import hypeman
from hypeman import config as config_module
from hypeman.config import Config, ConfigError, load_config


def load(tmp_path: Path, text: str = "", **environ: str) -> Config:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return load_config(file, environ)


def test_defaults(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.port, config.listen_address, config.data_dir) == (8080, "127.0.0.1", "/var/lib/hypeman")
    assert config.network.subnet_cidr == "10.100.0.0/16"
    assert config.limits.max_vcpus_per_instance == 16


def test_environment_over_file_over_default(tmp_path: Path) -> None:
    config = load(tmp_path, "port: 1\nnetwork:\n  dns_server: 9.9.9.9\n  guest_to_guest: true\n", PORT="2")
    assert config.port == 2
    assert config.network.dns_server == "9.9.9.9"
    assert config.network.guest_to_guest is True


def test_variables_of_sections_and_their_types(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        JWT_SECRET="0123" * 8,
        METRICS__PORT="9000",
        IMAGES__INSECURE_REGISTRIES="[a:5000, b]",
        NETWORK__DEFAULT_LIMITS="false",
        SOCKET__MODE="0600",
        PATH="/bin",
        CAPACITY="16",
    )
    assert config.jwt_secret == "0123" * 8  # a secret of digits stays text
    assert config.metrics.port == 9000
    assert config.images.insecure_registries == ("a:5000", "b")
    assert config.network.default_limits is False
    assert config.socket.mode == "0600"


@pytest.mark.parametrize(
    ("text", "environ", "names"),
    [
        ("prot: 1", {}, "prot"),
        ("network: {subnet: 10.0.0.0/8}", {}, "network"),
        ("port: many", {}, "port"),
        ("port: 70000", {}, "port"),
        ("network: 5", {}, "network"),
        ("", {"NETWORK__SUBNET": "x"}, "network"),
        ("", {"PORT": "x"}, "port"),
        ("limits: {max_log_size: lots}", {}, "limits.max_log_size"),
        ("network: {subnet_cidr: 10.0.0.1/8}", {}, "network"),
        ("network: {gateway: 192.168.0.1}", {}, "network.gateway"),
        ("hypervisor: {default: xen}", {}, "hypervisor.default"),
        ("images: {root_fs: ntfs}", {}, "images.root_fs"),
        ("data_dir: here", {}, "data_dir"),
        ("socket: {mode: rw}", {}, "socket.mode"),
        ("oversubscription: {cpu: 0}", {}, "oversubscription.cpu"),
        ("- a list", {}, "config.yaml"),
        ("a: [", {}, "config.yaml"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, environ: dict[str, str], names: str) -> None:
    with pytest.raises(ConfigError, match=names.replace(".", r"\.")):
        load(tmp_path, text, **environ)


def test_a_missing_file_that_was_asked_for_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml", {})


def test_the_secret_stays_out_of_the_repr(tmp_path: Path) -> None:
    assert "s3cret" not in repr(load(tmp_path, JWT_SECRET="s3cret" * 6))


@pytest.mark.parametrize("secret", ["a", "x" * 31, "ä" * 15])
def test_a_secret_that_can_be_guessed_is_refused(tmp_path: Path, secret: str) -> None:
    with pytest.raises(ConfigError, match="openssl rand -hex 32") as refused:
        load(tmp_path, JWT_SECRET=secret)
    assert len(secret) == 1 or secret not in refused.value.message
    assert load(tmp_path, JWT_SECRET="ä" * 16).jwt_secret


def test_sizes_and_rates_are_numbers(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "limits: {max_log_size: 1MB, max_overlay_size: 2147483648, max_total_volume_storage: ''}\n"
        "capacity: {network: 10gbps, memory: '512'}\n",
        CAPACITY__DISK_IO="500MB/s",
        RECLAIM__FLOOR="0",
        CAPACITY__DISK="",
    )
    assert config.limits.max_log_size == 1 << 20
    assert config.limits.max_overlay_size == 2 << 30
    assert config.limits.max_total_volume_storage == 0
    assert config.capacity.network == 10**10 // 8
    assert (config.capacity.memory, config.capacity.disk, config.capacity.disk_io) == (512, 0, 500 << 20)
    assert config.reclaim.floor == 0


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("capacity: {disk_io: fast}", "capacity.disk_io"),
        ("capacity: {network: fast}", "capacity.network"),
        ("limits: {max_image: 1}", "limits"),
        ("limits: {max_log_size: ''}", "limits.max_log_size"),
        ("limits: {max_log_size: -1}", "limits.max_log_size"),
        ("limits: {max_log_size: [1]}", "limits.max_log_size"),
        ("limits: [max_log_size]", "limits"),
        ("snapshots: {compression: gzip}", "snapshots.compression"),
        ("log: {level: loud}", "log.level"),
        ("hypervisor: {accelerator: 5}", "hypervisor.accelerator"),
    ],
)
def test_a_wrong_size_or_choice_is_refused_by_name(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"\b{key}\b".replace(".", r"\.")):
        load(tmp_path, text)


def test_a_refused_choice_names_the_possible_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'debug', 'info', 'warning', 'error'"):
        load(tmp_path, LOG__LEVEL="off")


def drop_in(tmp_path: Path, **texts: str) -> None:
    (tmp_path / "config.d").mkdir(exist_ok=True)
    for name, text in texts.items():
        (tmp_path / "config.d" / name.replace("_", ".")).write_text(text)


def test_drop_ins_apply_in_the_order_of_their_names(tmp_path: Path) -> None:
    """Sections are merged, lists and values are replaced; the environment wins."""
    drop_in(
        tmp_path,
        b_yaml="port: 3\nimages: {insecure_registries: [b]}\nlimits: {max_log_size: 2MB}\n",
        a_yaml="port: 2\nnetwork: {dns_server: 9.9.9.9}\nlimits: {max_log_size: 1MB}\n",
        c_yml="port: 4",
        _hidden_yaml="port: 5",
        empty_yaml="",
    )
    text = "port: 1\nnetwork: {guest_to_guest: true}\nimages: {insecure_registries: [a, c]}\n"
    config = load(tmp_path, text)
    assert (config.port, config.network.dns_server, config.network.guest_to_guest) == (3, "9.9.9.9", True)
    assert config.images.insecure_registries == ("b",)
    assert config.limits.max_log_size == 2 << 20
    assert load(tmp_path, text, PORT="6").port == 6


@pytest.mark.parametrize("text", ["prot: 1", "port: many", "network: 5", "limits: {max_log_size: lots}", "[1]", "a: ["])
def test_a_wrong_drop_in_is_refused_by_its_name(tmp_path: Path, text: str) -> None:
    drop_in(tmp_path, good_yaml="port: 1", wrong_yaml=text)
    with pytest.raises(ConfigError, match=r"config\.d/wrong\.yaml"):
        load(tmp_path)


IGNORED_KEYS = {"bridge_name"}
"""Accepted and documented as without effect."""


def sections(kind: Any) -> Iterator[type[msgspec.Struct]]:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        yield kind
        for field in msgspec.structs.fields(kind):
            yield from sections(field.type)
    for part in get_args(kind):
        yield from sections(part)


def test_every_key_is_read() -> None:
    """A key that nothing reads changes nothing. Compared by name only: attributes, and strings for ``getattr``."""
    used: set[str] = set()
    for path in Path(hypeman.__file__).parent.rglob("*.py"):
        if path != Path(config_module.__file__):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute):
                    used.add(node.attr)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    used.add(node.value)
    keys = {field for section in sections(Config) for field in section.__struct_fields__}
    assert keys - used == IGNORED_KEYS
