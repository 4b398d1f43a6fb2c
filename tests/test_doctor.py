"""What the doctor says about hypervisors: which are here, which version, and why one cannot be used."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from hypeman import doctor
from hypeman.config import CertificateFilesConfig, Config, IngressConfig
from hypeman.hypervisor.cloud_hypervisor import driver
from hypeman.hypervisor.kvm import KvmProof
from hypeman.telemetry.findings import Finding, Verdict
from tests.ingress.certs import write_pair


def program(path: Path, says: str) -> str:
    path.write_text(f"#!/bin/sh\n[ \"$*\" = '-machine help' ] && echo 'pc-q35-7.2  Standard PC' || echo '{says}'\n")
    path.chmod(0o755)
    return str(path)


async def findings(config: Config) -> dict[str, Finding]:
    return {finding.name: finding async for finding in doctor._hypervisor(config)}


@pytest.fixture
def kvm_works(monkeypatch: pytest.MonkeyPatch) -> None:
    async def works(self: KvmProof) -> str:
        return ""

    monkeypatch.setattr(KvmProof, "why_not", works)


@pytest.mark.usefixtures("kvm_works")
async def test_what_is_here_and_what_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere:/bin")
    config = Config()
    settings = msgspec.structs.replace(
        config.hypervisor,
        qemu_binary=program(tmp_path / "qemu", "QEMU emulator version 7.2.1"),
        cloud_hypervisor_binary=program(tmp_path / "cloud-hypervisor", "cloud-hypervisor v9.0"),
    )
    reported = await findings(msgspec.structs.replace(config, hypervisor=settings))
    assert reported["qemu"].verdict == Verdict.OK and "7.2.1" in reported["qemu"].message
    assert reported["kvm"].verdict == Verdict.OK
    assert (
        reported["cloud-hypervisor"].verdict == Verdict.WARN
        and "9.0.0 is too old" in reported["cloud-hypervisor"].message
    )
    assert reported["firecracker"].verdict == Verdict.OK and "not installed" in reported["firecracker"].message


async def test_a_server_without_qemu_names_what_to_install(tmp_path: Path) -> None:
    config = Config()
    settings = msgspec.structs.replace(config.hypervisor, qemu_binary=str(tmp_path / "missing"))
    reported = await findings(msgspec.structs.replace(config, hypervisor=settings))
    assert reported["qemu"].verdict == Verdict.FAIL and "qemu-system-x86" in reported["qemu"].remedy
    assert "kvm" not in reported


@pytest.mark.usefixtures("kvm_works")
@pytest.mark.parametrize(("abi", "words"), [(3, ", behind landlock"), (2, "; without landlock")])
async def test_missing_kernel_features_for_isolation_are_reported(
    abi: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "landlock_abi", lambda: abi)
    config = Config()
    binary = program(tmp_path / "cloud-hypervisor", "cloud-hypervisor v53.0")
    settings = msgspec.structs.replace(config.hypervisor, cloud_hypervisor_binary=binary)
    reported = await findings(msgspec.structs.replace(config, hypervisor=settings))
    assert reported["cloud-hypervisor"].verdict == Verdict.OK and words in reported["cloud-hypervisor"].message


def test_certificate_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    certificates = {}
    for name, days in (("good", 30), ("old", -1)):
        (tmp_path / name).mkdir()
        paths = write_pair(tmp_path / name, f"{name}.example.com", days=days)
        certificates[name] = CertificateFilesConfig(certificate=str(paths[0]), key=str(paths[1]))
    certificates["none"] = CertificateFilesConfig(certificate=str(tmp_path / "none"), key=str(tmp_path / "none"))
    config = msgspec.structs.replace(Config(), ingress=IngressConfig(certificates=certificates))
    found = {finding.name.rpartition(".")[2]: finding for finding in doctor._certificates(config)}
    assert [found[name].verdict for name in certificates] == [Verdict.OK, Verdict.WARN, Verdict.WARN]
    assert "good.example.com: until" in found["good"].message
    assert "expired" in found["old"].message
    assert "cannot be read" in found["none"].message


@pytest.mark.parametrize(
    ("release", "verdict", "text"),
    [
        ("4.18.0-553.el8", Verdict.FAIL, "5.10 is required"),
        ("5.10.0-35-amd64", Verdict.OK, "(Linux 6.1)"),
        ("6.1.0-40-amd64", Verdict.OK, "(Linux 6.2)"),
    ],
)
def test_an_older_kernel_loses_features(release: str, verdict: Verdict, text: str) -> None:
    [finding] = doctor._kernel(release)
    assert finding.verdict is verdict and text in finding.message


def test_a_new_kernel_loses_nothing() -> None:
    [finding] = doctor._kernel("6.18.44")
    assert finding.message == "Linux 6.18.44"


async def test_a_qemu_that_is_too_old_is_not_told_to_be_installed(tmp_path: Path) -> None:
    config = Config()
    settings = msgspec.structs.replace(
        config.hypervisor, qemu_binary=program(tmp_path / "qemu", "QEMU emulator version 4.2.1")
    )
    found = await findings(msgspec.structs.replace(config, hypervisor=settings))
    assert found["qemu"].verdict == Verdict.FAIL and "4.2.1 is too old, 5.2 is required" in found["qemu"].message
    assert "hypervisor.qemu_binary" in found["qemu"].remedy
