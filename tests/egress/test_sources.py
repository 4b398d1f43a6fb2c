"""Values that the operator supplies: files, systemd credentials, programs; who may use them, how they are renewed."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from hypeman.config import CredentialSourceConfig
from hypeman.egress import sources
from hypeman.egress.broker import Broker
from hypeman.egress.sources import Sources, read_output
from hypeman.egress.transforms import Unavailable, Value
from hypeman.egress.types import CredentialPolicy, CredentialSource, InjectAs, InjectRule
from hypeman.errors import InvalidRequest
from hypeman.host.processes import Processes

BEARER = InjectAs(header="Authorization", format="Bearer ${value}")


def uses(name: str, *hosts: str) -> dict[str, CredentialPolicy]:
    rule = InjectRule(hosts=hosts or None, as_=BEARER)
    return {"KEY": CredentialPolicy(source=CredentialSource(named=name), inject=(rule,))}


def configured(**kinds: Any) -> Sources:
    hosts = kinds.pop("hosts", ("api.example.com", "*.b.org"))
    return Sources({"s": CredentialSourceConfig(hosts=hosts, **kinds)}, Processes())


class FakeEgress:
    """Notes what is set and removed."""

    def __init__(self) -> None:
        self.set: list[tuple[str, dict[str, str]]] = []
        self.removed: list[str] = []
        self.changed = trio.Event()

    async def set_policy(
        self, instance: str, source: str, credentials: Any, secrets: Any, *, obtained: Any, web_only: bool, access: Any
    ) -> None:
        await trio.lowlevel.checkpoint()
        if any(value.text == "unusable" for value in obtained.values()):
            raise InvalidRequest("unusable")
        self.set.append((instance, {key: value.text for key, value in obtained.items()}))
        self.changed.set()

    async def remove(self, instance: str) -> None:
        self.removed.append(instance)

    async def until(self, *wanted: tuple[str, dict[str, str]]) -> None:
        with trio.fail_after(30):
            while not set(map(str, wanted)) <= set(map(str, self.set)):
                self.changed = trio.Event()
                await self.changed.wait()


@pytest.mark.parametrize(
    ("hosts", "good"),
    [
        (("api.example.com",), True),
        (("API.example.com.", "x.b.org", "*.b.org"), True),
        (("example.com",), False),
        (("*.example.com",), False),
        (("a.x.b.org",), False),
        (("api.example.com", "evil.test"), False),
        ((), False),
    ],
)
def test_only_for_the_hosts_of_the_source(hosts: tuple[str, ...], good: bool) -> None:
    """A client of the API cannot send the operator's value anywhere else, or everywhere."""
    found = configured(file="/x")
    if good:
        found.check(uses("s", *hosts))
    else:
        with pytest.raises(InvalidRequest, match="not allowed for"):
            found.check(uses("s", *hosts))
    with pytest.raises(InvalidRequest, match="no credential source"):
        found.check(uses("other", "api.example.com"))


async def test_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read again when it changes, also by being replaced; what cannot be read is named, not shown."""
    monkeypatch.setattr(sources, "_LOOK_AGAIN", 0.01)
    file = tmp_path / "key"
    source = configured(file=str(file)).find("s")
    with pytest.raises(Unavailable, match="cannot be read"):
        await source.obtain()
    file.write_text("first\n")
    assert await source.obtain() == Value("first")
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.wait_changed, Value("first"))
            (tmp_path / "new").write_text("second")
            (tmp_path / "new").rename(file)
    assert await source.obtain() == Value("second")
    for data in (b"\xff", b"x" * (sources.MAX_SIZE + 1)):
        file.write_bytes(data)
        with pytest.raises(Unavailable):
            await source.obtain()


async def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with trio.fail_after(10), pytest.raises(Unavailable, match=r"not a file|directory"):
            await configured(file=str(path)).find("s").obtain()


async def test_systemd_credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = configured(systemd="key").find("s")
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(Unavailable, match="no systemd"):
        await source.obtain()
    (tmp_path / "key").write_text("real")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert await source.obtain() == Value("real")


async def test_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets nothing of our environment; what it says when it fails is not repeated."""
    monkeypatch.setenv("JWT_SECRET", "ours")
    program = 'printf \'{"value": "%s", "expires_in": 60}\' "v${JWT_SECRET}"'
    value = await configured(exec=("/bin/sh", "-c", program)).find("s").obtain()
    assert value.text == "v" and 0 < value.expires_at - time.time() <= 60
    for script in ("echo secret >&2; exit 3", "echo secret", "head -c 100000 /dev/zero", "sleep 60"):
        source = configured(exec=("/bin/sh", "-c", script), timeout=0.5).find("s")
        with pytest.raises(Unavailable) as caught:
            await source.obtain()
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (b'{"value": "v"}', Value("v")),
        (b'{"value": "v", "expires_at": "2030-01-01T00:00:00Z", "more": 1}', Value("v", 1893456000.0)),
        (b'{"Version":1,"AccessKeyId":"A","SecretAccessKey":"S","Expiration":"2030-01-01T00:00:00+00:00"}', None),
    ],
)
def test_output(said: bytes, wanted: Value | None) -> None:
    assert read_output(said) == (wanted or Value(said.decode(), 1893456000.0))


@pytest.mark.parametrize(
    "said",
    [b"", b"secret", b"[]", b'"secret"', b"{}", b'{"value": 1}', b'{"value": ""}', b"\xff",
     b'{"AccessKeyId": "secret"}', b'{"value": "secret", "expires_at": 5}',
     b'{"value": "secret", "expires_at": "soon"}',
     b'{"value": "secret", "expires_at": "2030-01-01T00:00:00"}', b'{"value": "secret", "expires_in": -1}',
     b'{"value": "secret", "expires_in": true}', b'{"value": "secret", "expires_at": "2020-01-01T00:00:00Z"}',
     b'{"value": "secret", "expires_in": ' + b"1" * 400 + b"}", b'{"value": "secret", "expires_in": 1e300}'],
)  # fmt: skip
def test_output_refused(said: bytes) -> None:
    with pytest.raises(ValueError) as caught:
        read_output(said)
    assert "secret" not in str(caught.value)


class Script:
    """A supply under a test's control, in the place of a configured source."""

    name, hosts = "s", ()

    def covers(self, host: Any) -> bool:
        return True

    def __init__(self, *outcomes: Value | Exception) -> None:
        self.outcomes = list(outcomes)
        self.calls = 0
        self.go_on = trio.Event()
        self.renew = trio.Event()

    async def obtain(self) -> Value:
        self.calls += 1
        await self.go_on.wait()
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def wait_changed(self, value: Value) -> None:
        await self.renew.wait()
        self.renew = trio.Event()


@pytest.fixture
def brokered(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(script: Script) -> tuple[Broker, FakeEgress]:
        found, egress = configured(file="/x"), FakeEgress()
        monkeypatch.setattr(found, "find", lambda name: script)
        return Broker(egress, found, None, None), egress  # type: ignore[arg-type]

    return make


async def test_one_renewal_for_all(brokered: Any, autojump_clock: MockClock) -> None:
    """Many instances that need a value cause one attempt; a new value reaches all of them, and later ones at once."""
    script = Script(Value("one"), Value("two"))
    broker, egress = brokered(script)
    async with trio.open_nursery() as nursery:
        await nursery.start(broker.run)
        for number in range(5):
            await broker.set_policy(f"i{number}", f"10.0.0.{number}", uses("s", "api.example.com"), {})
        assert egress.set == [(f"i{number}", {}) for number in range(5)], "set at once, without the value"
        script.go_on.set()
        await egress.until(*((f"i{number}", {"KEY": "one"}) for number in range(5)))
        await broker.set_policy("late", "10.0.0.9", uses("s", "api.example.com"), {})
        assert egress.set[-1] == ("late", {"KEY": "one"})
        await broker.remove("i0")
        script.renew.set()
        await egress.until(*((name, {"KEY": "two"}) for name in ("i1", "i2", "i3", "i4", "late")))
        assert (script.calls, egress.removed) == (2, ["i0"])
        assert ("i0", {"KEY": "two"}) not in egress.set
        for name in ("i1", "i2", "i3", "i4", "late"):
            await broker.remove(name)
        assert broker._supplies == {}, "nobody needs the value: it is forgotten"
        nursery.cancel_scope.cancel()


async def test_failures_are_repeated(brokered: Any, autojump_clock: MockClock) -> None:
    """What was valid stays in force; what cannot be used in any request is no value."""
    script = Script(Unavailable("no"), Value("unusable"), ValueError("a bug"), Value("good"))
    script.go_on.set()
    broker, egress = brokered(script)
    async with trio.open_nursery() as nursery:
        await nursery.start(broker.run)
        await broker.set_policy("i", "10.0.0.1", uses("s", "api.example.com"), {})
        await egress.until(("i", {"KEY": "good"}))
        assert (script.calls, egress.set) == (4, [("i", {}), ("i", {"KEY": "good"})])
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("name", ["s", "gone"])
async def test_a_source_that_is_no_longer_for_the_host(name: str) -> None:
    """The configuration of now counts, not that of when the instance was made."""
    egress = FakeEgress()
    broker = Broker(egress, configured(file="/etc/hostname", hosts=("other.example.com",)), None, None)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(broker.run)
        await broker.set_policy("i", "10.0.0.1", uses(name, "api.example.com"), {})
        await broker.set_policy("j", "10.0.0.2", uses("s", "other.example.com"), {})
        await egress.until(("i", {}), ("j", {"KEY": Path("/etc/hostname").read_text().rstrip()}))
        assert [had for instance, had in egress.set if instance == "i"] == [{}]
        await broker.remove("i")
        await broker.remove("j")
        assert broker._supplies == {}
        nursery.cancel_scope.cancel()
