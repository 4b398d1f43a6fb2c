"""Directories of a compose file: copies that a stack gets, and files that `compose watch` carries into it."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hypeman.cli.compose import spec, watcher
from hypeman.cli.compose.model import ComposeError, Stack
from hypeman.cli.compose.watching import Action, Job, Rule, changed, plan, scan
from hypeman.errors import HypemanError
from hypeman.guest.session_types import ExecRequest
from tests.fakes.services.sessions import FakeExec


def load(text: str, directory: Path) -> Stack:
    return spec.parse(yaml.safe_load(text), directory, {})


# ── Copies of directories ────────────────────────────────────────────────────────────────────────


BINDS = """
name: shop
services:
  web:
    image: nginx
    volumes:
      - ./conf:/etc/nginx/conf.d:ro
      - {type: bind, source: data, target: /srv/data}
      - /var/cache
      - logs:/var/log
volumes: {logs: }
"""


def test_a_directory_becomes_a_volume(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "conf" / "site.conf").write_text("listen 80;")
    stack = load(BINDS, tmp_path)
    named, conf, data = stack.volumes
    assert [mount["mount_path"] for mount in stack.services[0].mounts] == ["/etc/nginx/conf.d", "/srv/data", "/var/log"]
    assert [mount["volume_id"] for mount in stack.services[0].mounts] == [conf.name, data.name, named.name]
    assert (conf.source, data.source) == (str(tmp_path / "conf"), str(tmp_path / "data"))
    assert (stack.services[0].mounts[0].get("readonly"), data.name, data.size_gb) == (True, "shop-web-srv-data", 10)
    assert [f"copy of {volume.source}" in warning for volume, warning in zip((conf, data), stack.warnings, strict=True)]

    (tmp_path / "data" / "more").write_text("x")
    assert load(BINDS, tmp_path).volumes == stack.volumes, "a writable copy is the guest's"
    (tmp_path / "conf" / "site.conf").chmod(0o600)
    changed_mode = load(BINDS, tmp_path)
    (tmp_path / "conf" / "site.conf").write_text("listen 81;")
    changed_text = load(BINDS, tmp_path)
    assert len({one.volumes[1].name for one in (stack, changed_mode, changed_text)}) == 3
    assert changed_text.services[0].content != stack.services[0].content


@pytest.mark.parametrize(
    ("mount", "message"),
    [
        ("./gone:/there:ro", "gone does not exist"),
        ("./file:/etc/:ro", "'/etc/' is not an absolute path of a file"),
        ("/dev/null:/there", "neither a directory nor a file"),
        ("/:/host:ro", "/ is the host's: a VM has its own"),
        ("/proc/self:/host:ro", "a VM has its own"),
        ("./here:there", "not an absolute path"),
        ("{type: image, source: a, target: /x}", "image is not supported"),
        ("{type: volume, source: d, target: /x, volume: {subpath: a}}", "mounted as a whole"),
        ("{type: volume, source: gone, target: /x}", "no volume 'gone'"),
    ],
)
def test_what_cannot_be_copied(tmp_path: Path, mount: str, message: str) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ComposeError, match=message):
        load(f"services: {{web: {{image: nginx, volumes: [{mount}]}}}}", tmp_path)


def test_files_that_the_guest_would_write_itself(tmp_path: Path) -> None:
    for name in ("hosts", "hostname", "resolv.conf"):
        (tmp_path / name).write_text("ours")
    mounts = "['./hosts:/etc/hosts:ro', './hostname:/etc/hostname:ro', './resolv.conf:/etc/resolv.conf:ro']"
    [volume] = load(f"services: {{web: {{image: nginx, volumes: {mounts}}}}}", tmp_path).volumes
    assert {file.path for file in volume.files} == {"etc/hosts", "etc/hostname", "etc/resolv.conf"}


def test_copies_do_not_share_a_name(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    targets = ("/a.b", "/a-b", "/a/b", "/A/b", "/a_b")
    mounts = ", ".join(f"'./here:{target}'" for target in targets)
    names = {
        volume.name for volume in load(f"name: s\nservices: {{w: {{image: x, volumes: [{mounts}]}}}}", tmp_path).volumes
    }
    assert len(names) == len(targets)
    assert "s-w-a-b" in names
    for text in (
        "services: {a: {image: x, volumes: ['./here:/b/c']}, a-b: {image: x, volumes: ['./here:/c']}}",
        "services: {a: {image: x, volumes: ['./here:/b', 'a-b:/c']}}\nvolumes: {a-b: }",
    ):
        with pytest.raises(ComposeError, match="two volumes would have the name s-a-b"):
            load(f"name: s\n{text}", tmp_path)


def test_a_directory_that_is_too_large(tmp_path: Path) -> None:
    with open(tmp_path / "disk.img", "wb") as sparse:
        sparse.truncate((1 << 30) + 1)
    with pytest.raises(ComposeError, match="use a named volume"):
        load("services: {web: {image: nginx, volumes: ['.:/src']}}", tmp_path)


def test_paths_of_an_included_file_are_about_its_folder(tmp_path: Path) -> None:
    (tmp_path / "sub" / "conf").mkdir(parents=True)
    (tmp_path / "sub" / "more.yaml").write_text(
        "services: {web: {image: nginx, volumes: ['./conf:/conf', {type: bind, source: conf, target: /again}],"
        " develop: {watch: [{action: restart, path: conf}]}}}"
    )
    stack = load("include: [sub/more.yaml]\nservices: {}", tmp_path)
    assert {volume.source for volume in stack.volumes} == {str(tmp_path / "sub" / "conf")}
    assert stack.services[0].watch[0].path == tmp_path / "sub" / "conf"
    with pytest.raises(ComposeError, match=r"include must be a list, as in include: \[sub/more.yaml\]"):
        load("include: sub/more.yaml\nservices: {}", tmp_path)


def test_changed_files_of_a_read_only_copy_replace_its_service(cli: Any, server: Any, tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "a").write_text("one")
    file = tmp_path / "compose.yaml"
    file.write_text("name: s\nservices: {web: {image: nginx, volumes: ['./conf:/conf:ro']}}")
    assert cli("compose", "-f", str(file), "up").exit_code == 0
    assert contents(server) == [{"a": b"one"}]
    assert cli("compose", "-f", str(file), "plan").stdout.count("keep") == 2
    (tmp_path / "conf" / "a").write_text("two")
    refused = cli("compose", "-f", str(file), "up")
    assert (refused.exit_code, "--replace" in refused.stderr) == (1, True)
    done = cli("compose", "-f", str(file), "up", "--replace")
    assert (done.exit_code, "an older copy" in done.stderr) == (0, True)
    assert contents(server) == [{"a": b"two"}]


def contents(server: Any) -> list[dict[str, bytes]]:
    """Of each volume, the files that it was filled with."""
    volumes = server.world.volumes
    return [members(volumes.archives[key]) for key in volumes.volumes]


def members(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {each.name: tar.extractfile(each).read() for each in tar if each.isfile()}  # type: ignore[union-attr]


# ── Rules ────────────────────────────────────────────────────────────────────────────────────────


def test_what_a_rule_watches(tmp_path: Path) -> None:
    for name in ("a.py", "b.txt", "node_modules/x.py", ".git/HEAD", "sub/c.py", "sub/.c.py.swp", "out/d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    rule = Rule("web", Action.SYNC, tmp_path, "/src", ignore=("node_modules/",), include=("**/*.py",))
    assert set(scan(rule, "out\n")) == {"a.py", "sub/c.py"}
    one = Rule("web", Action.REBUILD, tmp_path / "b.txt")
    assert set(scan(one)) == {"."}
    (tmp_path / "b.txt").unlink()
    assert scan(one) == {}


def test_what_changes_lead_to() -> None:
    here = Path("/here")
    sync = Rule("web", Action.SYNC_EXEC, here, "/src", command=("reload",))
    restart = Rule("web", Action.SYNC_RESTART, here / "conf", "/etc/conf")
    rebuild = Rule("db", Action.REBUILD, here)
    before = {"same": (1, 1, 1), "old": (1, 1, 1), "gone": (1, 1, 1)}
    assert changed(before, {"same": (1, 1, 1), "old": (2, 1, 1), "new": (1, 1, 1)}) == (["new", "old"], ["gone"])
    assert plan([(sync, [], []), (restart, [], [])]) == []
    assert plan([(sync, ["a/b"], ["c"]), (restart, ["."], []), (rebuild, [], ["x"])]) == [
        Job(
            "web",
            written=((here / "a/b", "/src/a/b"), (here / "conf", "/etc/conf")),
            removed=("/src/c",),
            commands=(("reload",),),
            restart=True,
        ),
        Job("db", rebuild=True),
    ]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("{action: move, path: .}", "action must be one of rebuild, restart, sync"),
        ("{action: sync, target: /x}", "path is missing"),
        ("{action: sync, path: .}", "target must be an absolute path"),
        ("{action: sync, path: ., target: x}", "target must be an absolute path"),
        ("{action: rebuild, path: .}", "the service has no build"),
        ("{action: sync+exec, path: ., target: /x}", "exec.command is missing"),
        ("{action: sync+exec, path: ., target: /x, exec: {command: [a], privileged: true}}", "exec.privileged"),
        ("{action: restart, path: ., when: now}", "when is not supported"),
        ("5", "must have keys"),
    ],
)
def test_rules_that_are_refused(tmp_path: Path, rule: str, message: str) -> None:
    with pytest.raises(ComposeError, match=message):
        load(f"services: {{web: {{image: nginx, develop: {{watch: [{rule}]}}}}}}", tmp_path)


# ── The command ──────────────────────────────────────────────────────────────────────────────────


class Steps:
    """Stands in for the wait between two looks: each step is done in one of them, and seen by the next two."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self._steps = [call for step in steps for call in (step, lambda: None, lambda: None)]

    def __call__(self, seconds: float) -> None:
        if not self._steps:
            raise KeyboardInterrupt
        self._steps.pop(0)()


class Guest(FakeExec):
    """Every program ends at once."""

    def __init__(self, request: ExecRequest) -> None:
        super().__init__(request)
        self._send.send_nowait(0)


@pytest.fixture
def asked(server: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The programs that were run in guests."""
    ran: list[tuple[str, ...]] = []

    async def execute(ref: str, request: ExecRequest) -> Guest:
        ran.append(tuple(request.command))
        return Guest(request)

    monkeypatch.setattr(server.world.instances, "exec", execute)
    return ran


def test_files_are_carried_into_the_guest(
    cli: Any, server: Any, asked: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "src" / "sub").mkdir(parents=True)
    (tmp_path / "src" / "a").write_text("one")
    (tmp_path / "src" / "old").write_text("x")
    (tmp_path / "app.conf").write_text("x")
    file = tmp_path / "compose.yaml"
    file.write_text(
        """
name: s
services:
  web:
    image: nginx
    develop:
      watch:
        - {action: sync+exec, path: src, target: /src, initial_sync: true, exec: {command: kill -HUP 1}}
        - {action: sync+restart, path: app.conf, target: /etc/app.conf}
"""
    )

    def written(*names: str) -> dict[str, bytes | None]:
        return {name: server.world.instances.files[name][1] for name in names}

    seen: list[Any] = []

    def edit() -> None:
        seen.append(written("/src/a", "/src/old"))
        (tmp_path / "src" / "sub" / "new").write_text("new")
        (tmp_path / "src" / "old").unlink()

    def configure() -> None:
        seen.append([written("/src/sub/new"), list(asked), restarts(server)])
        (tmp_path / "app.conf").write_text("other")

    monkeypatch.setattr(watcher, "sleep", Steps(edit, configure))
    done = cli("compose", "-f", str(file), "watch")
    assert done.exit_code == 130, done.output
    assert seen == [
        {"/src/a": b"one", "/src/old": b"x"},
        [{"/src/sub/new": b"new"}, [("rm", "-rf", "--", "/src/old"), ("kill", "-HUP", "1")], []],
    ]
    assert written("/etc/app.conf") == {"/etc/app.conf": b"other"}
    assert restarts(server) == ["stop", "start"]
    assert "sync     web: /src/sub/new, /src/old" in done.stderr


def restarts(server: Any) -> list[str]:
    return [what for what, _ in server.world.instances.asked if what in ("stop", "start")]


def test_a_change_is_tried_again_until_it_arrives(
    cli: Any, server: Any, asked: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("one")
    file = tmp_path / "compose.yaml"
    rule = "{action: sync, path: a, target: /a}"
    file.write_text(f"name: s\nservices: {{web: {{image: nginx, develop: {{watch: [{rule}]}}}}}}")
    copy_to = server.world.instances.copy_to

    async def refuse(*_: object) -> None:
        raise HypemanError("the guest is away")

    def breaks() -> None:
        monkeypatch.setattr(server.world.instances, "copy_to", refuse)
        (tmp_path / "a").write_text("other")

    def mends() -> None:
        assert "/a" not in server.world.instances.files
        monkeypatch.setattr(server.world.instances, "copy_to", copy_to)

    monkeypatch.setattr(watcher, "sleep", Steps(breaks, lambda: None, mends))
    done = cli("compose", "-f", str(file), "watch")
    assert done.stderr.count("the guest is away") == 1, done.stderr
    assert server.world.instances.files["/a"][1] == b"other"


def test_a_changed_source_is_built_again(
    cli: Any, server: Any, asked: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch")
    (tmp_path / ".dockerignore").write_text("notes\n")
    file = tmp_path / "compose.yaml"
    rule = "{action: rebuild, path: .}"
    file.write_text(f"name: s\nservices: {{web: {{build: ., image: team/web, develop: {{watch: [{rule}]}}}}}}")
    server.world.builds.outcome = {"image_ref": "docker.io/team/web:latest", "image_digest": "sha256:abc"}
    ids: list[set[str]] = []

    def note() -> None:
        ids.append(set(server.world.instances.instances))
        (tmp_path / "notes").write_text("ignored")

    def edit() -> None:
        ids.append(set(server.world.instances.instances))
        (tmp_path / "Dockerfile").write_text("FROM other")

    monkeypatch.setattr(watcher, "sleep", Steps(note, edit))
    assert cli("compose", "-f", str(file), "watch").exit_code == 130
    assert ids[0] == ids[1] != set(server.world.instances.instances)
    assert len(server.world.instances.instances) == 1


def test_nothing_to_watch(cli: Any, tmp_path: Path) -> None:
    file = tmp_path / "compose.yaml"
    file.write_text("name: s\nservices: {web: {image: nginx}}")
    assert "no service has develop.watch" in cli("compose", "-f", str(file), "watch").stderr
    assert "there is no service db" in cli("compose", "-f", str(file), "watch", "db").stderr
