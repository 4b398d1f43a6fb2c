"""Manifests, indexes and configs: what is read, what is refused, and that nothing else ever happens."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypeman.images.manifest import (
    CONFIG_TYPES,
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_MANIFEST_BYTES,
    Index,
    Manifest,
    ManifestError,
    PlatformMissing,
    choose_platform,
    parse_config,
    parse_manifest,
)
from hypeman.images.reference import Platform

DIGEST = "sha256:" + "0" * 64
LAYER = {"mediaType": "application/vnd.oci.image.layer.v1.tar+zstd", "digest": DIGEST, "size": 5}
CONFIG = {"mediaType": CONFIG_TYPES[0], "digest": DIGEST, "size": 7}
GOOD: dict[str, Any] = {"schemaVersion": 2, "mediaType": MANIFEST_TYPES[0], "config": CONFIG, "layers": [LAYER]}


def parsed(**changes: Any) -> Manifest | Index:
    document = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    return parse_manifest(json.dumps(document).encode())


def test_good() -> None:
    manifest = parsed(mediaType=None, annotations={"x": "y"}, unknown=[1])
    assert isinstance(manifest, Manifest)
    docker = parsed(mediaType=MANIFEST_TYPES[1], config={**CONFIG, "mediaType": CONFIG_TYPES[1]})
    assert isinstance(docker, Manifest)


def test_null_is_an_absent_field() -> None:
    """As Go's readers take it: Docker, containerd, Podman."""
    nothing = {"annotations": None, "urls": None, "data": None, "platform": None}
    document: dict[str, Any] = {**GOOD, "mediaType": None, "annotations": None, "layers": [{**LAYER, **nothing}]}
    document |= {"manifests": None, "fsLayers": None, "subject": None, "config": {**CONFIG, **nothing}}
    manifest = parse_manifest(json.dumps(document).encode())
    assert isinstance(manifest, Manifest) and len(manifest.layers) == 1
    run: dict[str, Any] = {
        **dict.fromkeys(["User", "Env", "Entrypoint", "WorkingDir", "StopSignal", "OnBuild", "Healthcheck"]),
        "Cmd": ["sh", None],
        "Labels": {"a": None, "b": "c"},
        "ExposedPorts": {"80/tcp": None},
        "Volumes": {"/data": None, "/more": {}},
    }
    rootfs = {"type": None, "diff_ids": [DIGEST]}
    body = {"config": run, "rootfs": rootfs, "history": None, "variant": None, "os": None, "architecture": None}
    config = parse_config(json.dumps(body).encode(), manifest).config
    assert config is not None and (config.user, config.working_dir, config.env) == ("", "", None)
    assert config.cmd == ("sh", "")
    assert config.labels == {"a": "", "b": "c"}
    assert list(config.exposed_ports or ()) == ["80/tcp"]
    assert list(config.volumes or ()) == ["/data", "/more"]
    empty = parse_manifest(json.dumps({**GOOD, "layers": None}).encode())
    assert isinstance(empty, Manifest)
    body = {"config": None, "rootfs": {"type": "layers", "diff_ids": None}}
    assert parse_config(json.dumps(body).encode(), empty).config is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schemaVersion": 1}, "schema 1"),
        ({"fsLayers": []}, "schema 1"),
        ({"schemaVersion": 3}, "schema version 3"),
        ({"schemaVersion": "2"}, "cannot be read"),
        ({"manifests": []}, "an index and an image at once"),
        ({"mediaType": INDEX_TYPES[0]}, "its content is not that"),
        ({"mediaType": "text/plain"}, "unknown media type"),
        ({"config": {**CONFIG, "mediaType": "application/vnd.cncf.helm.config.v1+json"}}, "not a container image"),
        ({"config": {**CONFIG, "size": 1 << 30}}, "config is"),
        ({"config": {**CONFIG, "digest": "sha256:../../etc"}}, "cannot be read"),
        ({"config": {**CONFIG, "digest": "sha512:" + "0" * 128}}, "cannot be read"),
        ({"layers": [{**LAYER, "size": -1}]}, "cannot be read"),
        ({"layers": [{**LAYER, "size": 1 << 60}]}, "cannot be read"),
        ({"layers": [LAYER] * 513}, "cannot be read"),
        ({"layers": [{**LAYER, "mediaType": "application/vnd.oci.image.layer.v1.tar+encrypted"}]}, "unknown media"),
    ],
)
def test_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ManifestError, match=reason):
        parsed(**changes)


def test_too_long() -> None:
    with pytest.raises(ManifestError, match="at most"):
        parse_manifest(b" " * (MAX_MANIFEST_BYTES + 1))


def index(*platforms: dict[str, str] | None) -> Index:
    entries = [
        {"mediaType": MANIFEST_TYPES[0], "digest": f"sha256:{n:064x}", "size": 1, "platform": platform}
        for n, platform in enumerate(platforms)
    ]
    document = parse_manifest(json.dumps({"schemaVersion": 2, "manifests": entries}).encode())
    assert isinstance(document, Index)
    return document


ARM7 = {"os": "linux", "architecture": "arm64", "variant": "v7"}
ARM8 = {"os": "linux", "architecture": "arm64", "variant": "v8"}
AMD = {"os": "linux", "architecture": "amd64"}
ATTESTATION = {"os": "unknown", "architecture": "unknown"}


@pytest.mark.parametrize(
    ("offered", "wanted", "chosen"),
    [
        ([ARM8, AMD], Platform("linux", "amd64"), 1),
        ([ATTESTATION, AMD], Platform("linux", "amd64"), 1),
        ([ARM7, ARM8], Platform("linux", "arm64", "v8"), 1),
        ([ARM7, ARM8], Platform("linux", "arm64"), 0),
        ([AMD], Platform("linux", "amd64", "v3"), 0),
        ([None], Platform("linux", "amd64"), 0),
        ([ARM8], Platform("linux", "amd64"), None),
        ([ARM7], Platform("linux", "arm64", "v8"), None),
        ([None, ARM8], Platform("linux", "amd64"), None),
        ([], Platform("linux", "amd64"), None),
    ],
)
def test_platform_is_chosen(offered: list[dict[str, str] | None], wanted: Platform, chosen: int | None) -> None:
    if chosen is None:
        with pytest.raises(PlatformMissing, match="is not made for"):
            choose_platform(index(*offered), wanted)
    else:
        assert choose_platform(index(*offered), wanted).digest == f"sha256:{chosen:064x}"


def test_config() -> None:
    manifest = parsed()
    assert isinstance(manifest, Manifest)
    config = {"rootfs": {"type": "layers", "diff_ids": [DIGEST]}, "config": {"Env": None, "Cmd": None, "Volumes": {}}}
    assert parse_config(json.dumps(config).encode(), manifest).rootfs.diff_ids == (DIGEST,)
    bad_configs: list[object] = [{}, {"rootfs": {"diff_ids": []}}, {"rootfs": {"type": "x", "diff_ids": [DIGEST]}}, []]
    for bad in bad_configs:
        with pytest.raises(ManifestError):
            parse_config(json.dumps(bad).encode(), manifest)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from([DIGEST, *MANIFEST_TYPES, *INDEX_TYPES]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["schemaVersion", "mediaType", "config", "layers", "manifests", "digest", "size", "platform"]),
        inner, max_size=5,
    ),
    max_leaves=15,
))  # fmt: skip
def test_any_document(document: Any) -> None:
    """A document gives a Struct or a ManifestError, and never anything else."""
    try:
        parse_manifest(json.dumps(document).encode())
    except ManifestError as error:
        assert str(error)


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    with pytest.raises(ManifestError):
        parse_manifest(data)
