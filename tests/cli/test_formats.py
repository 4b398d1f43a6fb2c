"""Docker's templates in ``--format``: the language, and the names of fields."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from hypeman.cli import docker_fields
from hypeman.cli.templates import Fields, Lazy, Method, Template, TemplateError
from hypeman.instances.model.types import InstanceState
from hypeman.network.types import PortMapping

VALUE = Fields(
    Name="web",
    State=Fields(Running=True, ExitCode=0),
    Mounts=[Fields(Name="a", RW=True), Fields(Name="b", RW=False)],
    Labels={"team": "x", "app.kubernetes.io/name": "y"},
    Ports={"80/tcp": [Fields(HostPort="8080")]},
    Env=["A=b", "C=d"],
    Nothing=None,
    Late=Lazy(lambda: "asked"),
    Label=Method(lambda name="": f"<{name}>"),
)


@pytest.mark.parametrize(
    ("template", "output"),
    [
        ("{{.Name}}", "web"),
        (r"{{.Name}}\t{{.State.ExitCode}}\n", "web\t0\n"),
        ("{{ .State.Running }} {{.Nothing}}", "true <no value>"),
        ("{{json .State}}", '{"Running":true,"ExitCode":0}'),
        ("{{.State | json}}", '{"Running":true,"ExitCode":0}'),
        ("{{.Env}} {{.Labels}}", "[A=b C=d] map[app.kubernetes.io/name:y team:x]"),
        ("{{range .Mounts}}{{.Name}} {{end}}", "a b "),
        ("{{range $i, $mount := .Mounts}}{{$i}}={{$mount.Name}};{{end}}", "0=a;1=b;"),
        ("{{range $name, $value := .Labels}}{{$name}}:{{$value}} {{end}}", "app.kubernetes.io/name:y team:x "),
        ("{{range .Nothing}}x{{else}}none{{end}}", "none"),
        ("{{range .Env}}{{println .}}{{end}}", "A=b\nC=d\n"),
        ("{{range .Env -}}\n {{.}} {{- /* a comment */ -}} \n{{end}}", "A=bC=d"),
        ("{{range .Env}}{{$.Name}}{{end}}", "webweb"),
        ('{{index .Labels "app.kubernetes.io/name"}}{{index .Labels "gone"}}', "y"),
        ('{{(index (index .Ports "80/tcp") 0).HostPort}}', "8080"),
        ("{{(index .Mounts 1).Name | upper}}", "B"),
        ('{{join .Env ","}} {{len .Env}} {{lower "X"}} {{index (split "a:b" ":") 1}}', "A=b,C=d 2 x b"),
        ("{{if .State.Running}}up{{else}}down{{end}}", "up"),
        ('{{if eq .Name "db" "web"}}{{if not .Nothing}}yes{{end}}{{end}}', "yes"),
        ('{{if and .Name (ne .State.ExitCode 0)}}failed{{else}}{{or .Nothing "-"}}{{end}}', "-"),
        ('{{.Label "team"}} {{.Late}}', "<team> asked"),
        ("{{.Labels.team}} {{.Labels.gone}}", "x <no value>"),
        ('{{`a "b"`}}{{print 1 true}}', 'a "b"1true'),
    ],
)
def test_the_language(template: str, output: str) -> None:
    assert Template(template).render(VALUE) == output


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{.Name", "without }}"),
        ("{{}}", "is empty"),
        ("{{end}}", "without if or range"),
        ("{{if .Name}}x", "{{end}} is missing"),
        ("{{range}}x{{end}}", "the end"),
        ("{{printf `%s` .Name}}", "there is no function printf; there are json, "),
        ("{{with .Name}}x{{end}}", "with is not supported"),
        ("{{if .Name}}a{{else if .Env}}b{{end}}", "{{else if .Env}} is not supported"),
        ("{{.Name ? 1}}", "not understood"),
        ("{{(.Name}}", "not understood"),
        ("{{range 1, 2 := .Env}}x{{end}}", "is no variable"),
    ],
)
def test_what_is_no_template(template: str, message: str) -> None:
    with pytest.raises(TemplateError, match="^.*" + message.replace("{", r"\{").replace("}", r"\}")):
        Template(template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{.Pid}}", "there is no field .Pid; there are .Name, .State, "),
        ("{{.State.Pid}}", "there is no field .Pid; there are .Running, .ExitCode"),
        ("{{.Nothing.Status}}", "has no field .Status"),
        ("{{index .Env 2}}", "there is no element 2 of 2"),
        ("{{len 5}}", "len: "),
        ("{{and}}", "and: arguments are missing"),
        ("{{.Name 5}}", "takes no arguments"),
        ("{{range .Name}}x{{end}}", "a list or a map"),
        ("{{$x}}", r"there is no variable \$x"),
    ],
)
def test_what_a_value_does_not_have(template: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        Template(template).render(VALUE)


def test_tables() -> None:
    template = Template(r'table {{.ID}}\t{{.CreatedAt}}\t{{.Label "team"}}')
    rows = [Fields(ID="1", CreatedAt="today", Label=Method(lambda _: "x")) for _ in range(2)]
    assert template.lines(rows, {}).splitlines() == [
        "ID   CREATED AT   team",
        "1    today        x",
        "1    today        x",
    ]


@pytest.fixture
def world(cli: Any, server: Any) -> Any:
    """An instance in each of three states, with what people ask for."""
    cli("volume", "create", "data", "--size", "1GB")
    cli("run", "nginx:1.25", "--name", "web", "-l", "team=x", "-v", "data:/srv", "-e", "SECRET=s")
    made = server.world.instances.instances
    [(key, web)] = made.items()
    made[key] = msgspec.structs.replace(web, ports=(PortMapping(host_port=8000, guest_port=80),))
    for name in ("old", "away"):
        cli("run", "nginx:1.25", "--name", name)
    cli("stop", "old")
    cli("standby", "away")
    return server


def test_lists(cli: Any, world: Any) -> None:
    def lines(*arguments: str) -> list[str]:
        done = cli(*arguments)
        assert done.exit_code == 0, done.stderr
        return list(done.stdout.splitlines())

    assert sorted(lines("ps", "-a", "--format", "{{.Names}} {{.State}}")) == [
        "away standby",
        "old exited",
        "web running",
    ]
    assert lines("ps", "--format", '{{.Ports}} {{.Label "team"}} {{.Labels}} {{.LocalVolumes}}') == [
        "0.0.0.0:8000->80/tcp, [::]:8000->80/tcp x team=x 1"
    ]
    assert lines("ps", "--filter", "name=web", "--format", "{{.Status}}")[0].startswith("Up ")
    [old] = lines("ps", "-a", "--filter", "status=exited", "--format", "{{.Status}}")
    assert old.startswith("Exited (") and old.endswith(" ago")
    [row] = map(json.loads, lines("ps", "--format", "{{json .}}"))
    assert (row["Names"], len(row["ID"]), "Label" in row) == ("web", 12, False)
    assert len(lines("ps", "--no-trunc", "--format", "{{.ID}}")[0]) > 12
    assert lines("ps", "--format", r"table {{.Names}}\t{{.Image}}") == ["NAMES   IMAGE", "web     nginx:1.25"]
    assert lines("ps", "--filter", "name=gone", "--format", "{{.Names}}") == []
    assert lines("images", "--format", "{{.Repository}}:{{.Tag}}") == ["nginx:1.25"]
    assert lines("volume", "ls", "--format", "{{.Name}} {{.Driver}} {{.Size}}") == ["data local 1GB"]


def test_one(cli: Any, world: Any) -> None:
    def shown(*arguments: str) -> str:
        done = cli(*arguments)
        assert done.exit_code == 0, done.stderr
        return str(done.stdout.removesuffix("\n"))

    assert shown("inspect", "-f", "{{.State.Status}} {{.State.Running}} {{.Name}}", "web") == "running true /web"
    assert shown("inspect", "--format", "{{.State.ExitCode}}", "old", "old").count("\n") == 1
    assert shown("inspect", "-f", "{{range .Mounts}}{{.Destination}}{{end}} {{.HostConfig.Memory}}", "web") == (
        f"/srv {1 << 30}"
    )
    assert shown("inspect", "-f", "{{range .Config.Env}}{{.}}{{end}}", "web") == "SECRET=***"
    assert shown("inspect", "--show-env", "-f", "{{range .Config.Env}}{{.}}{{end}}", "web") == "SECRET=s"
    port = '{{(index (index .NetworkSettings.Ports "80/tcp") 0).HostPort}}'
    assert shown("inspect", "-f", port, "web") == "8000"
    assert shown("inspect", "-f", "{{if .State.Health}}{{.State.Health.Status}}{{else}}none{{end}}", "web") == "none"
    assert shown("image", "inspect", "-f", "{{.Os}} {{.RepoTags}}", "nginx:1.25") == "linux [nginx:1.25]"
    assert shown("volume", "inspect", "-f", "{{.Name}}", "data") == "data"
    assert shown("version", "-f", "{{.Client.Version}} {{.Server.Version}}").count(".") >= 2
    assert shown("info", "--format", "{{.Containers}} {{.ContainersRunning}} {{.ContainersStopped}}") == "3 1 1"


def test_the_version_of_the_client_needs_no_server(shell: Any) -> None:
    result = shell("--base-url", "unix:///nowhere", "version", "-f", "{{.Client.Version}}")
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ps", "--format", "{{.Size}}"], "there is no field .Size; there are .ID, "),
        (["inspect", "-f", "{{.State.Pid}}", "web"], "there is no field .Pid"),
        (["volume", "inspect", "-f", "{{.Mountpoint}}", "data"], "there is no field .Mountpoint"),
        (["ps", "--format", "{{printf}}"], "there is no function printf"),
        (["stats", "--format", "{{.Name}}"], "templates are not supported by this command"),
        (["run", "--format", "{{.ID}}", "nginx"], "templates are not supported by this command"),
    ],
)
def test_refusals_by_name(cli: Any, world: Any, arguments: list[str], message: str) -> None:
    count = len(world.world.instances.asked)
    done = cli(*arguments)
    assert (done.exit_code in (2, 125), message in done.stderr, done.stdout) == (True, True, ""), done.stderr
    assert len(world.world.instances.asked) == count


def test_every_state_has_a_word() -> None:
    assert set(docker_fields.STATES) == {state.value for state in InstanceState}
