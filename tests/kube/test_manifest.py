"""What a cluster gets before hosts join it: no more rights than the node uses, and none for the group of all nodes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from hypeman.cli.main import hypeman
from hypeman.kube import manifest, names
from hypeman.kube.credentials import load_kubeconfig

BROAD = {"system:nodes", "system:authenticated", "system:unauthenticated", "system:serviceaccounts"}


def test_no_rule_reads_secrets_or_reaches_pods_of_others() -> None:
    for rule in manifest.RULES:
        assert "*" not in {*rule["verbs"], *rule["apiGroups"], *rule["resources"]}
        assert not {"secrets", "configmaps", "pods", "nodes", "serviceaccounts"} & set(rule["resources"])


def test_every_owner_that_is_looked_up_may_be_read() -> None:
    may = {(group, name) for rule in manifest.RULES for group in rule["apiGroups"] for name in rule["resources"]}
    assert {(group, plural) for (group, _), plural in names.PLURALS.items()} <= may


def test_rights_are_bound_to_hosts_by_name() -> None:
    bindings = [each for each in manifest.of_cluster() if each["kind"] == "ClusterRoleBinding"]
    wide = [
        binding["roleRef"]["name"]
        for binding in bindings
        if BROAD & {subject["name"] for subject in binding["subjects"]}
    ]
    assert wide == ["system:certificates.k8s.io:certificatesigningrequests:selfnodeclient"]
    [binding] = manifest.of_node("host1")
    assert binding["roleRef"]["name"] == manifest.ROLE
    assert [subject["name"] for subject in binding["subjects"]] == ["system:node:host1"]


def test_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's file and the cluster's objects have the same token, and the file is the host's alone."""
    kubeconfig, ca = tmp_path / "bootstrap", tmp_path / "ca.pem"
    ca.write_text("the CA")
    monkeypatch.setenv("NODE__BOOTSTRAP_KUBECONFIG", str(kubeconfig))
    monkeypatch.setenv("NODE__KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setenv("NODE__NAME", "host1")
    arguments = ["node", "join", "--server", "https://10.0.0.1:6443", "--ca-file", str(ca)]
    done = CliRunner().invoke(hypeman, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    objects = list(yaml.safe_load_all(done.stdout))
    [secret] = [each for each in objects if each["kind"] == "Secret"]
    token = f"{secret['stringData']['token-id']}.{secret['stringData']['token-secret']}"
    access = load_kubeconfig(kubeconfig)
    assert (access.token, access.server, access.authorities()) == (token, "https://10.0.0.1:6443", "the CA")
    assert os.stat(kubeconfig).st_mode & 0o777 == 0o600
    assert [each for each in objects if each["metadata"]["name"] == "hypeman-node:host1"]
    (tmp_path / "kubeconfig").write_text(json.dumps({}))
    assert CliRunner().invoke(hypeman, arguments).exit_code != 0, "it would not be used"


def test_no_part_of_a_token_is_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kubectl reads ``1e2345`` as a float, which stringData may not have; PyYAML writes it without quotes."""
    (tmp_path / "ca.pem").write_text("the CA")
    monkeypatch.setenv("NODE__BOOTSTRAP_KUBECONFIG", str(tmp_path / "bootstrap"))
    monkeypatch.setenv("NODE__KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr("secrets.token_hex", lambda size: "1e23456789012345"[: 2 * size])
    arguments = ["node", "join", "--server", "https://10.0.0.1:6443", "--ca-file", str(tmp_path / "ca.pem")]
    done = CliRunner().invoke(hypeman, arguments, catch_exceptions=False)
    [secret] = [each for each in yaml.safe_load_all(done.stdout) if each["kind"] == "Secret"]
    parts = secret["stringData"]["token-id"], secret["stringData"]["token-secret"]
    assert [len(part) for part in parts] == [6, 16]
    assert all(part.isalnum() and part[0] in "ghijklmnopqrstuvwxyz" for part in parts)


def test_join_reports_a_configuration_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("the CA")
    (tmp_path / "config.yaml").write_text("node: {nonsense: 1}")
    arguments = ["node", "--config", str(tmp_path / "config.yaml"), "join", "--server", "https://x", "--ca-file"]
    done = CliRunner().invoke(hypeman, [*arguments, str(tmp_path / "ca.pem")], catch_exceptions=False)
    assert (done.exit_code, "nonsense" in done.output) == (1, True)
