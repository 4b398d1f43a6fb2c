"""Installing prints no token and shows no secret to other users of the host."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from hypeman.config import Config, load_config

ROOT = Path(__file__).parents[2]
APPLIANCE = ROOT / "packaging" / "appliance"
PROGRAMS = ("od", "tr", "mkdir", "chmod", "mv", "cat", "sed", "awk", "getent", "hypeman")


class Installed:
    """One run of make-config, with every program that it may start replaced by one that notes its arguments."""

    def __init__(self, directory: Path) -> None:
        self.config = directory / "etc" / "config.yaml"
        self._programs = directory / "programs"
        self._notes = directory / "notes"
        self._programs.mkdir()
        for name in PROGRAMS:
            real = shutil.which(name) or "/bin/true"
            self._spy(name, f'exec {real} "$@"')
        self._spy("groupadd", "exit 0")
        self.run()

    def run(self) -> None:
        self.output = subprocess.run(
            ["/bin/sh", str(APPLIANCE / "make-config"), str(ROOT / "packaging" / "config.yaml"), str(self.config)],
            env={"PATH": str(self._programs)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout

    @property
    def arguments(self) -> str:
        return self._notes.read_text()

    def _spy(self, name: str, then: str) -> None:
        program = self._programs / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >> {self._notes}\n{then}\n')
        program.chmod(0o755)


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    return Installed(tmp_path)


def test_the_settings_are_whole_and_private(installed: Installed) -> None:
    config = load_config(installed.config, {})
    assert len(config.jwt_secret) == 64
    assert (config.socket.group, config.socket.mode) == ("hypeman", "0660")
    assert stat.S_IMODE(installed.config.stat().st_mode) == 0o600
    template = yaml.safe_load((ROOT / "packaging" / "config.yaml").read_text())
    assert yaml.safe_load(installed.config.read_text()) == {**template, "jwt_secret": config.jwt_secret}
    assert isinstance(config, Config)


def test_no_secret_is_printed_or_an_argument(installed: Installed) -> None:
    secret = load_config(installed.config, {}).jwt_secret
    assert "od -An" in installed.arguments, "the spies are not asked"
    for text in (installed.output, installed.arguments):
        assert secret not in text
        assert not re.search(r"\bey[\w-]+\.", text)
    assert "hypeman token" in installed.output
    assert "hypeman token" not in installed.arguments


def test_the_group_is_made_once_and_settings_stay(installed: Installed) -> None:
    before = installed.config.read_bytes()
    installed.run()
    assert installed.config.read_bytes() == before
    assert "groupadd --system hypeman" in installed.arguments


def test_no_script_of_the_package_mints_a_token() -> None:
    for path in (*APPLIANCE.glob("*.sh"), APPLIANCE / "make-config", *(APPLIANCE / "debian").iterdir()):
        commands = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
        assert not re.search(r"\$\(.*hypeman token", "\n".join(commands)), path


def test_checksums_are_signed_with_a_key(tmp_path: Path) -> None:
    if shutil.which("ssh-keygen") is None:
        pytest.skip("no ssh-keygen")
    key, dist = tmp_path / "key", tmp_path / "dist"
    dist.mkdir()
    sums = dist / "SHA256SUMS"
    sums.write_text("00  hypeman\n")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    subprocess.run([APPLIANCE / "sign", dist], env=environment, check=True, timeout=60)
    assert not (dist / "SHA256SUMS.sig").exists(), "without a key nothing looks signed"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True, timeout=60)
    subprocess.run([APPLIANCE / "sign", dist], env={**environment, "SIGNING_KEY": str(key)}, check=True, timeout=60)
    signers = tmp_path / "signers"
    signers.write_text("releases@hypeman " + key.with_suffix(".pub").read_text())

    def verified() -> bool:
        command: list[str | Path] = [
            "ssh-keygen",
            "-Y",
            "verify",
            "-f",
            signers,
            "-I",
            "releases@hypeman",
            "-n",
            "hypeman-release",
        ]
        result = subprocess.run([*command, "-s", dist / "SHA256SUMS.sig"], input=sums.read_bytes(), timeout=60)
        return result.returncode == 0

    assert verified()
    sums.write_text("11  hypeman\n")
    assert not verified()
