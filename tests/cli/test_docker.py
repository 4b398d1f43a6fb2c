"""What people know from Docker: accepted as they type it, or refused with what to use instead."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from hypeman.cli import output
from hypeman.cli.instances import docker_filter
from hypeman.cli.main import SECTIONS, Commands, hypeman, main
from hypeman.cli.policies import docker_restart
from hypeman.cli.program import RunCommand
from hypeman.cli.run import create_body, parse_mount, variables_in
from hypeman.cli.session import GIGABYTES, SIZE, Session, environment


def body_of(*arguments: str) -> dict[str, Any]:
    flags = dict(hypeman.commands["run"].make_context("run", list(arguments)).params)
    if flags["command"]:
        flags["cmd"] = flags["command"]
    return create_body(flags.pop("image"), flags)


@pytest.mark.parametrize(
    ("arguments", "program"),
    [
        (["alpine", "ls", "-l", "--all"], ["ls", "-l", "--all"]),
        (["--name", "web", "alpine", "sh", "-c", "echo --name x"], ["sh", "-c", "echo --name x"]),
        (["alpine", "--name", "web", "ls", "--name", "other"], ["ls", "--name", "other"]),
        (["-it", "-eA=b", "-w", "/srv", "alpine", "sh"], ["sh"]),
        (["--name=web", "alpine", "--", "-x"], ["-x"]),
        (["alpine"], []),
    ],
)
def test_the_program_of_run(arguments: list[str], program: list[str]) -> None:
    body = body_of(*arguments)
    assert list(body.get("cmd", ())) == program
    assert body["image"] == "alpine"
    assert body["name"] == "web" or "web" not in " ".join(arguments)


def test_global_options_before_the_program_only() -> None:
    root = click.Context(hypeman)
    front = hypeman.in_front(root, ["run", "alpine", "-o", "json", "tool", "-o", "yaml"])
    assert front == ["-o", "json", "run", "alpine", "tool", "-o", "yaml"]


def test_flags_as_docker_spells_them() -> None:
    body = body_of("-m", "1.5GB", "-u", "1000:50", "-w", "/srv", "-h", "db.example", "--label", "a=b", "alpine")
    assert (body["size"], body["user"], body["working_dir"]) == ("1536MB", "1000:50", "/srv")
    assert (body["hostname"], body["tags"]) == ("db.example", {"a": "b"})
    assert docker_restart("on-failure:3") == {"policy": "on_failure", "max_attempts": 3}
    assert docker_restart("unless-stopped") == {"policy": "always"}
    assert docker_restart("no") == {"policy": "never"}
    for wrong in ("sometimes", "always:3", "on-failure:x"):
        with pytest.raises(click.BadParameter):
            docker_restart(wrong)


def test_variables_of_the_caller() -> None:
    assert environment(["A=b=c", "HOME", "GONE"], {"HOME": "/root"}) == {"A": "b=c", "HOME": "/root"}
    with pytest.raises(click.UsageError):
        environment(["=x"], {})


def test_env_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "1")
    assert variables_in(io.StringIO("# a comment\n\nA=b #c\r\nHERE\n")) == {"A": "b #c", "HERE": "1"}
    assert variables_in(io.StringIO("\ufeffA=1\n  B= 2 \n\t# no\n")) == {"A": "1", "B": " 2 "}
    for wrong in ("export A=1\n", "B = 2\n"):
        with pytest.raises(click.UsageError, match="white space in the name"):
            variables_in(io.StringIO(wrong))


def test_sizes_in_one_grammar() -> None:
    for text, sent in {"1.5GB": "1536MB", "512MB": "512MB", "0.5MB": "512KB", "1024": "1KB"}.items():
        assert SIZE.convert(text, None, None) == sent
        assert SIZE.convert(output.size(SIZE.size_of(text, None, None)), None, None) == sent
    for text, gigabytes in {"10": 10, "10GB": 10, "1TB": 1024}.items():
        assert GIGABYTES.convert(text, None, None) == gigabytes
    for wrong in ("1.5", "1.5GB", "0", "x"):
        with pytest.raises(click.BadParameter):
            GIGABYTES.convert(wrong, None, None)
    for wrong in ("1..5GB", ".5GB", "-1GB", "1.3B"):
        with pytest.raises(click.BadParameter):
            SIZE.convert(wrong, None, None)


@pytest.mark.parametrize(
    ("arguments", "alternative"),
    [
        (["run", "-v", "/host:/guest", "alpine"], "volume create"),
        (["run", "--privileged", "alpine"], "kernel of its own"),
        (["run", "--net", "host", "alpine"], "its own network"),
        (["run", "--gpus", "all", "alpine"], "--gpu-profile"),
        (["pause", "web"], "hypeman standby"),
        (["rename", "a", "b"], "hypeman fork"),
        (["network", "create", "x"], "its own network"),
        (["run", "--network", "host", "alpine"], "each instance has its own network"),
        (["run", "--network=shop", "alpine"], "--network-group"),
        (["run", "--read-only", "alpine"], "layer is the instance's own"),
        (["run", "-P", "alpine"], "-p GUEST_PORT"),
        (["run", "--stop-timeout", "5", "alpine"], "hypeman stop -t"),
        (["exec", "-d", "web", "sleep", "5"], "leaves it running"),
        (["exec", "--privileged", "web", "sh"], "every capability"),
        (["exec", "--gone", "web", "sh"], "No such option: --gone"),
        (["device", "ls", "--format", "{{.Names}}"], "--transform '#.name'"),
        (["container", "ls"], "hypeman ps"),
        (["create", "alpine"], "hypeman run -d"),
        (["run", "--cpus", "few", "alpine"], "not a number of CPUs"),
        (["logs", "--tail", "some", "web"], "neither a number of lines nor all"),
    ],
)
def test_refusals_name_the_alternative(cli: Any, server: Any, arguments: list[str], alternative: str) -> None:
    done = cli(*arguments)
    assert (done.exit_code, alternative in done.stderr) == (125 if arguments[0] == "run" else 2, True), done.stderr
    assert server.world.instances.asked == []


def test_a_tag_without_value_is_an_error_and_not_everything(cli: Any, server: Any) -> None:
    server.world.instances.add("web")
    for arguments in (["ps", "--tag", "team"], ["image", "list", "--tag", "team"], ["run", "x", "--tag", "team"]):
        assert cli(*arguments).exit_code == (125 if arguments[0] == "run" else 2)


def test_lists_are_filtered_and_cut(cli: Any, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("web-1", "web-2", "db"):
        server.world.instances.add(name)
    names = [row["name"] for row in json.loads(cli("ps", "-a", "-o", "json", "--filter", "name=web-*").stdout)]
    assert names == ["web-1", "web-2"]
    assert cli("ps", "-a", "-q", "--filter", "name=db", "--filter", "state=Stopped").stdout == ""
    assert cli("ps", "--filter", "name").exit_code == 2
    rows = [{"name": "x" * 50, "tags": ["a", "b"]}]
    table = output.render_table(rows, [("ID", lambda _: "abc"), ("NAME", lambda row: row["name"])], width=30)
    assert table.splitlines()[1] == "abc  " + "x" * 24 + "…"
    assert output.matching(rows, ["tags=b"]) == rows
    assert output.narrowed([3, 50, 9], 20) == [3, 8, 9]


def test_filters_as_docker_spells_them(cli: Any, server: Any) -> None:
    for name in ("web", "db"):
        server.world.instances.add(name)
    cli("stop", "db")
    assert cli("ps", "-q", "--no-trunc", "--filter", "status=exited").stdout.count("\n") == 1
    assert [row["name"] for row in json.loads(cli("ps", "-o", "json", "--filter", "status=running").stdout)] == ["web"]
    assert [row["name"] for row in json.loads(cli("ps", "-a", "-o", "json", "--filter", "name=e").stdout)] == ["web"]
    assert docker_filter("name=w?b") == "name=w?b"
    assert docker_filter("label=team=a") == "tags.team=a"
    assert docker_filter("label=team") == "tags.team=*"
    assert docker_filter("ancestor=nginx") == "image=*nginx:*"
    told = cli("ps", "-a", "--filter", "nmae=web")
    assert (told.exit_code, "none of the 2 has this field; there are" in told.stderr) == (0, True)


def test_several_at_once(cli: Any, server: Any) -> None:
    for name in ("web", "db"):
        server.world.instances.add(name)
    assert [instance["name"] for instance in json.loads(cli("inspect", "web", "db").stdout)] == ["web", "db"]
    assert cli("stop", "-t", "3", "web", "db").stdout.splitlines() == ["web is Stopped", "db is Stopped"]
    assert [request.grace for what, request in server.world.instances.asked if what == "stop"] == ["3s", "3s"]
    assert cli("start", "web", "db").stdout.splitlines() == ["web is Running", "db is Running"]
    assert cli("stop", "db", "gone").exit_code == 1


def test_what_is_missing_does_not_hide_what_is_there(cli: Any, server: Any) -> None:
    for name in ("web", "db"):
        server.world.instances.add(name)
    done = cli("inspect", "web", "gone", "db")
    assert (done.exit_code, "gone" in done.stderr) == (1, True)
    assert [instance["name"] for instance in json.loads(done.stdout)] == ["web", "db"]
    assert (cli("inspect", "gone").exit_code, cli("inspect", "gone").stdout) == (1, "")


def test_inspect_finds_images_and_volumes_too(cli: Any, server: Any) -> None:
    cli("run", "nginx:1", "--name", "web")
    cli("volume", "create", "data")
    assert [row.get("name") for row in json.loads(cli("inspect", "web", "nginx:1", "data").stdout)] == [
        "web",
        "docker.io/library/nginx:1",
        "data",
    ]
    assert cli("inspect", "-f", "{{.Os}}", "nginx:1").stdout == "linux\n"
    assert cli("inspect", "-f", "{{.Driver}}", "data").stdout == "local\n"


def test_a_volume_that_is_missing_is_made(cli: Any, server: Any) -> None:
    """As by Docker; and a volume needs no size."""
    first = cli("run", "-d", "-v", "data:/srv", "nginx")
    assert (first.exit_code, "made the volume data, 10GB" in first.stderr) == (0, True)
    assert cli("run", "-d", "-v", "data:/srv:ro", "nginx").stderr == ""
    assert cli("volume", "create", "other").exit_code == 0
    assert cli("volume", "ls", "--format", "{{.Name}} {{.Size}}").stdout == "data 10GB\nother 10GB\n"


def test_exit_codes_of_run_are_the_programs_or_125(shell: Any, server: Any) -> None:
    for arguments in (["--no-such-flag", "nginx"], ["-m", "lots", "nginx"], [], ["--name", "Not Legal", "nginx"]):
        done = shell("run", *arguments)
        assert (done.returncode, b"Error: " in done.stderr) == (125, True)
    assert shell("run", "--help").returncode == 0
    assert shell("--base-url", "unix:///nowhere", "run", "nginx").returncode == 125


def test_tag_prints_nothing(cli: Any, server: Any) -> None:
    cli("pull", "nginx")
    for command in (("tag",), ("image", "tag")):
        done = cli(*command, "nginx", "other:v1")
        assert (done.exit_code, done.stdout) == (0, "")
    assert json.loads(cli("-o", "json", "tag", "nginx", "other:v1").stdout)["name"].endswith("other:v1")


def test_waiting_for_the_end_prints_exit_codes(cli: Any, server: Any) -> None:
    server.world.instances.add("web")
    cli("stop", "web")
    done = cli("wait", "web")
    assert (done.exit_code, len(done.stdout.split())) == (0, 1)


def test_networks_of_docker_are_no_images() -> None:
    assert body_of("--network", "none", "alpine", "ls")["network"] == {"enabled": False}
    assert body_of("--network", "bridge", "alpine")["image"] == "alpine"
    assert body_of("--network", "alpine", "echo", "--network", "host")["cmd"] == ("echo", "--network", "host")
    assert body_of("--cpus", "1.5", "alpine")["vcpus"] == 2


def test_global_options_after_names_of_several() -> None:
    root = click.Context(hypeman)
    for command in ("inspect", "stop", "rm", "restart"):
        assert hypeman.in_front(root, [command, "web", "-o", "json"]) == ["-o", "json", command, "web"]


def test_what_is_to_be_removed_is_removed_by_the_server(cli: Any, server: Any) -> None:
    """Also if the command is gone by then."""
    assert cli("run", "-d", "--rm", "--name", "one", "nginx").exit_code == 0
    cli("run", "-d", "nginx")
    assert [request.auto_remove for what, request in server.world.instances.asked if what == "create"] == [True, False]
    assert body_of("--rm", "--restart", "no", "alpine")["auto_remove"]
    assert cli("run", "--rm", "--restart", "always", "nginx").exit_code == 125


def test_the_image_is_pulled_again_if_asked(cli: Any, server: Any) -> None:
    refused = cli("run", "--pull", "never", "docker.io/library/gone")
    assert (refused.exit_code, server.world.instances.asked) == (125, [])


ODD = {"PYTHONIOENCODING": "iso-8859-1", "PYTHONUTF8": "0"}


def test_output_that_the_terminal_cannot_show(shell: Any, server: Any) -> None:
    server.world.instances.add("web", image="docker.io/acme/→:1")
    result = shell("ps", env=ODD)
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"acme/?:1" in result.stdout


def test_a_file_that_is_no_text(shell: Any, server: Any, tmp_path: Path) -> None:
    (tmp_path / "variables").write_bytes(b"A=\xff\xfe\n")
    result = shell("run", "--env-file", str(tmp_path / "variables"), "alpine")
    assert (result.returncode, b"variables: not text in UTF-8" in result.stderr, b"Traceback" in result.stderr) == (
        125,
        True,
        False,
    )
    result = shell("run", "--credentials-json", f"@{tmp_path}/gone", "alpine")
    assert (result.returncode, b"gone: No such file" in result.stderr, b"Errno" in result.stderr) == (125, True, False)


def test_an_empty_no_color_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("NO_COLOR", "")
    assert output.use_colour(Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not output.use_colour(Terminal())


def test_a_question_that_nobody_answers(shell: Any, cli: Any, server: Any) -> None:
    server.world.instances.add("web")
    cli("stop", "web")
    result = shell("system", "prune", input=b"")
    assert (result.returncode, b"nothing was changed" in result.stderr) == (130, True)


def test_an_interrupted_command_does_not_claim_that_nothing_was_changed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "each", interrupt)
    monkeypatch.setattr(sys, "argv", ["hypeman", "stop", "web"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, capsys.readouterr().err.strip()) == (130, "")


def test_ps_says_what_it_hides(cli: Any, server: Any) -> None:
    server.world.instances.add("web")
    assert cli("ps").stderr == ""
    cli("stop", "web")
    assert "1 more that is not running: hypeman ps --all" in cli("ps").stderr
    assert cli("ps", "-o", "json").stderr == ""


def test_every_command_of_the_help_has_a_subject() -> None:
    listed = {name for names in SECTIONS.values() for name in names}
    other = {name for name, found in hypeman.commands.items() if not found.hidden} - listed
    assert other <= {"completion", "man", "inspect"}


def test_exec_leaves_standard_input_alone(shell: Any, server: Any) -> None:
    server.world.instances.add("web")
    assert shell("exec", "web", "cat", input=b"for the next command").stdout == b""


def test_restart_commit_prune(cli: Any, server: Any) -> None:
    server.world.instances.add("web")
    assert cli("restart", "web").stdout.strip() == "web is Running"
    assert cli("system", "prune", "--force").stdout == ""
    cli("stop", "web")
    assert cli("system", "prune", input="n\n").exit_code != 0
    assert server.world.instances.instances
    assert cli("system", "prune", "-f").stdout == "web\n"
    assert not server.world.instances.instances


def test_pruning_one_kind_needs_all(cli: Any, server: Any) -> None:
    cli("volume", "create", "old", "--size", "1GB")
    cli("pull", "docker.io/library/old:latest")
    for kind in ("volume", "image"):
        done = cli(kind, "prune", "-f")
        assert (done.exit_code, done.stdout, "--all" in done.stderr) == (0, "", True)
        assert cli(kind, "prune", "--all", input="n\n").exit_code != 0
    assert cli("volume", "prune", "-af").stdout == "old\n"
    assert cli("image", "prune", "-af").stdout == "docker.io/library/old:latest\n"
    assert cli("volume", "list", "-q").stdout == cli("image", "list", "-q").stdout == ""


def test_the_instances_created_last(cli: Any, server: Any) -> None:
    for name in ("first", "second", "third"):
        server.world.instances.add(name)
    cli("stop", "third")
    newest = sorted(json.loads(cli("ps", "-a", "-o", "json").stdout), key=lambda row: str(row["created_at"]))[::-1]
    for arguments, count in ((["-l"], 1), (["-n", "2"], 2)):
        shown = json.loads(cli("ps", *arguments, "-o", "json").stdout)
        assert len(shown) == count
        assert [row["created_at"] for row in shown] == [row["created_at"] for row in newest[:count]]


def test_help_is_a_command_too(cli: Any) -> None:
    assert cli("help").stdout == cli("--help").stdout
    assert cli("help", "volume", "create").stdout == cli("volume", "create", "--help").stdout
    assert cli("help", "nothing").exit_code == 2


def test_mounts() -> None:
    assert parse_mount("data:/data:ro") == {"volume_id": "data", "mount_path": "/data", "readonly": True}


def test_run_is_a_run_command() -> None:
    assert isinstance(hypeman.commands["run"], RunCommand)


@pytest.mark.parametrize("command", [("rm", "-f"), ("restart",)])
def test_one_that_is_missing_leaves_no_other_out(cli: Any, server: Any, command: tuple[str, ...]) -> None:
    server.world.instances.add("web")
    done = cli(*command, "missing", "web")
    assert done.exit_code == 1
    assert "missing" in done.stderr
    assert done.stdout.startswith("web")


def test_a_schedule_without_retention_names_the_flags(cli: Any, server: Any) -> None:
    server.world.instances.add("web")
    refused = cli("snapshot", "schedule", "set", "web", "--interval", "1h")
    assert refused.exit_code == 2
    assert "--max-count" in refused.stderr


def test_arguments_of_top_are_those_of_ps() -> None:
    """Also ``-o``, which is the output format elsewhere."""
    root = click.Context(hypeman)
    words = ["top", "web", "-o", "pid"]
    assert isinstance(hypeman, Commands)
    assert hypeman.in_front(root, words) == words
    context = hypeman.commands["top"].make_context("top", words[1:])
    assert (context.params["instance"], context.params["arguments"]) == ("web", ("-o", "pid"))
