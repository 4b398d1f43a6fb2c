"""Pods with real VMs, through kubectl: the host with QEMU."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from tests.fleet import registry
from tests.fleet.control import eventually
from tests.fleet.fleet import Fleet, in_namespace, pod
from tests.real.appliance import IMAGE

pytestmark = pytest.mark.fleet

CLIENT = """
import socket
with socket.create_connection(("127.0.0.1", 18080), 60) as connection:
    print(connection.makefile().read(), end="")
"""

SCRIPT = "echo began; while true; do echo line; sleep 1; done & exec nc -ll -p 8080 -e echo served"


@pytest.fixture(scope="module")
def namespace(fleet: Fleet) -> Iterator[str]:
    """With one pod ``vm`` that prints lines and serves a port."""
    with fleet.namespace() as name:
        container = {"command": ["sh", "-c", SCRIPT], "env": [{"name": "COLOUR", "value": "blue"}]}
        fleet.control.apply(pod("vm", name, node="host3", container=container))
        fleet.wait_running(name, 1)
        yield name


def test_exec(fleet: Fleet, namespace: str) -> None:
    def run(*command: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        forward = ["-i"] if stdin is not None else []
        argv = fleet.control.command("exec", *forward, "vm", "-n", namespace, "--", *command)
        return subprocess.run(argv, input=stdin or "", capture_output=True, text=True, timeout=120)

    result = run("sh", "-c", "echo out; echo err >&2; echo $COLOUR; exit 3")
    assert (result.stdout, result.stderr.splitlines()[0], result.returncode) == ("out\nblue\n", "err", 3)
    assert run("cat", stdin="hello\n" * 1000).stdout == "hello\n" * 1000
    assert run("no-such-program").returncode != 0


def test_logs(fleet: Fleet, namespace: str) -> None:
    def logs(*options: str) -> list[str]:
        return fleet.control.kubectl("logs", "vm", "-n", namespace, *options).splitlines()

    assert logs()[:2] == ["began", "line"]
    assert logs("--tail=1") == ["line"]

    def times() -> list[datetime]:
        return [datetime.fromisoformat(line.split()[0]) for line in logs("--timestamps")]

    eventually(lambda: times()[-1] - times()[0] >= timedelta(seconds=5), "it prints a line a second")
    seen = times()
    assert seen == sorted(seen)
    recent = logs(f"--since-time={seen[-1]:%Y-%m-%dT%H:%M:%SZ}")
    assert 0 < len(recent) < len(logs()), "not what was printed before"
    assert logs("--since=1h")[0] == "began"
    assert "not found" in fleet.control.try_kubectl("logs", "vm", "-n", namespace, "--previous").stderr
    argv = fleet.control.command("logs", "-f", "--tail=1", "vm", "-n", namespace)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        assert [follower.stdout.readline() for _ in range(3)] == ["line\n"] * 3
        follower.kill()


def test_attach(fleet: Fleet, namespace: str) -> None:
    """Output only: a program in a VM has no standard input."""
    argv = fleet.control.command("attach", "vm", "-n", namespace, "--quiet")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as attached:
        assert attached.stdout is not None
        assert [attached.stdout.readline() for _ in range(2)] == ["line\n"] * 2
        attached.kill()
    refused = fleet.control.try_kubectl("attach", "vm", "-n", namespace, "--stdin", stdin="hello\n")
    assert "has no standard input" in refused.stderr, refused


def test_debug(fleet: Fleet, namespace: str) -> None:
    """An ephemeral container cannot run in a VM: kubectl says so and ends, and the pod goes on."""
    debug = ("debug", "vm", "-n", namespace, f"--image={IMAGE}", "-c", "debugger", "--attach", "--", "sh")
    refused = fleet.control.try_kubectl(*debug)
    assert "kubectl exec" in refused.stderr and refused.returncode != 0, refused
    described = fleet.control.kubectl("describe", "pod", "vm", "-n", namespace)
    assert "spec.ephemeralContainers 'debugger'" in described and "kubectl exec" in described
    [found] = fleet.wait_running(namespace, 1)
    assert found["status"]["containerStatuses"][0]["restartCount"] == 0


def test_a_program_that_ends_has_a_previous_log(fleet: Fleet) -> None:
    with fleet.namespace() as namespace:
        again = {"command": ["sh", "-c", "echo run $(cat /proc/sys/kernel/random/boot_id); sleep 3; exit 4"]}
        fleet.control.apply(pod("again", namespace, node="host3", container=again))

        def status() -> dict[str, Any]:
            found: dict[str, Any] = fleet.control.get("pod", "again", "-n", namespace)["status"]["containerStatuses"][0]
            return found

        eventually(lambda: status()["restartCount"] == 1 and "running" in status()["state"], "it was started again")
        assert status()["lastState"]["terminated"]["exitCode"] == 4
        now = eventually(lambda: fleet.control.kubectl("logs", "again", "-n", namespace), "it has printed")
        before = fleet.control.kubectl("logs", "again", "-n", namespace, "--previous")
        assert [len(text.splitlines()) for text in (now, before)] == [1, 1]
        assert now.startswith("run ") and before.startswith("run ") and now != before


def test_an_image_of_a_private_registry(fleet: Fleet) -> None:
    """Refused with the reason while the Secret is wrong; pulled and run once it is right; nothing is left then."""
    host = fleet.host("host3")
    with registry.registry(fleet.control), fleet.namespace() as namespace:
        private = {"image": registry.IMAGE, "imagePullPolicy": "Always"}
        fleet.control.apply(
            registry.login("login", namespace, password="guessed"),
            pod("private", namespace, node=host.name, container=private, imagePullSecrets=[{"name": "login"}]),
        )

        def waits() -> str:
            [status] = fleet.control.get("pod", "private", "-n", namespace)["status"]["containerStatuses"]
            return f"{status['state']['waiting']['reason']}: {status['state']['waiting']['message']}"

        eventually(lambda: waits().startswith(("ErrImagePull", "ImagePullBackOff")), "the pull is refused", host.node)
        assert "login" in waits() and "guessed" not in waits(), waits()
        fleet.control.apply(registry.login("login", namespace))
        fleet.wait_running(namespace, 1)
        done = fleet.control.try_kubectl("exec", "private", "-n", namespace, "--", "sh", "-c", "echo here; exit 4")
        assert (done.stdout, done.returncode) == ("here\n", 4), done
        fleet.control.kubectl("delete", "pod", "private", "-n", namespace)
        assert not in_namespace(host, namespace)
        assert "guessed" not in host.server.log.read_text() + host.node.log.read_text()


def test_port_forward(fleet: Fleet, namespace: str) -> None:
    argv = fleet.control.command("port-forward", "pod/vm", "-n", namespace, "18080:8080")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as forward:
        assert forward.stdout is not None
        assert "Forwarding" in forward.stdout.readline()
        for _ in range(2):
            argv = fleet.control.namespace.command("python3", "-c", CLIENT)
            result = subprocess.run(argv, capture_output=True, text=True, timeout=100)
            assert result.stdout == "served\n", result.stderr
        forward.kill()


def test_the_host_is_upgraded_under_a_running_vm(fleet: Fleet, namespace: str) -> None:
    """Server and node program are replaced; the guest does not notice."""
    host = fleet.host("host3")

    def boot_id() -> str:
        return fleet.control.kubectl("exec", "vm", "-n", namespace, "--", "cat", "/proc/sys/kernel/random/boot_id")

    before = boot_id()
    host.node.end(kill=True)
    host.server.end()
    host.start_server()
    host.start_node()
    fleet.wait_ready(host)
    eventually(lambda: boot_id() == before, "the same guest answers", host.node, host.server)
    [found] = fleet.wait_running(namespace, 1)
    assert found["status"]["containerStatuses"][0]["restartCount"] == 0


def test_deletion_leaves_nothing(fleet: Fleet, namespace: str) -> None:
    host = fleet.host("host3")
    fleet.control.kubectl("delete", "pod", "vm", "-n", namespace)
    assert not in_namespace(host, namespace)
    assert not host.ask("GET", "/resources")["allocations"]
