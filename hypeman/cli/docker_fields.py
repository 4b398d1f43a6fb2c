"""What Docker's names of fields in ``--format`` templates are here: one function for each kind of object, from what
the API gives to the object that a template sees.

A name of Docker's that is missing has no counterpart, and is refused. Pure but for what is lazy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from hypeman import __version__
from hypeman.cli.output import port_rows, size
from hypeman.cli.templates import Fields, Lazy, Method
from hypeman.units import parse_size

HEADERS: Mapping[str, str] = {
    "CreatedAt": "CREATED AT",
    "CreatedSince": "CREATED",
    "ID": "ID",
    "Name": "VOLUME NAME",
    "RunningFor": "CREATED",
}
"""Headers of the columns whose names do not say it."""
STATES: Mapping[str, str] = {
    "Created": "created",
    "Initializing": "created",
    "Running": "running",
    "Shutdown": "running",
    "Paused": "paused",
    "Standby": "standby",
    "Stopped": "exited",
    "Unknown": "dead",
}
"""Docker's words for states; it has none for standby."""
_SHORT = 12
_ZERO_TIME = "0001-01-01T00:00:00Z"
_RESTARTS = {"always": "always", "on_failure": "on-failure", "never": "no"}


def whole_instance_row(row: Mapping[str, Any]) -> Fields:
    """A line of ``docker ps --no-trunc``."""
    return Fields({**instance_row(row), "ID": row["id"]})


def instance_row(row: Mapping[str, Any]) -> Fields:
    """A line of ``docker ps``."""
    tags = dict(row.get("tags") or {})
    return Fields(
        ID=row["id"][:_SHORT],
        Image=row["image"],
        Names=row["name"],
        State=_docker_state(row),
        Status=_status(row),
        Ports=", ".join(_port_texts(row)),
        CreatedAt=_local(row["created_at"]),
        RunningFor=f"{_ago(row['created_at'])} ago",
        Labels=_labels(tags),
        Label=Method(lambda name="": tags.get(name, "")),
        Mounts=",".join(str(mount["volume_id"]) for mount in row.get("volumes") or ()),
        LocalVolumes=str(len(row.get("volumes") or ())),
        Networks=_network_name(row),
    )


def anything(row: Mapping[str, Any]) -> Fields:
    """``docker inspect`` of whatever has that name."""
    return image(row) if "digest" in row else one_volume(row) if "size_gb" in row else instance(row)


def instance(row: Mapping[str, Any]) -> Fields:
    """``docker inspect`` of a container."""
    state, network = row["state"], row.get("network") or {}
    policy = row.get("restart_policy") or {}
    found: dict[str, Any] = {
        "Id": row["id"],
        "Created": row["created_at"],
        "Name": f"/{row['name']}",
        "State": _state(row),
        "RestartCount": int((row.get("restart_status") or {}).get("attempts") or 0),
        "Platform": "linux",
        "HostConfig": Fields(
            Memory=parse_size(row["size"]) if row.get("size") else 0,
            NanoCpus=int(row.get("vcpus") or 0) * 10**9,
            AutoRemove=bool(row.get("auto_remove")),
            RestartPolicy=Fields(
                Name=_RESTARTS.get(policy.get("policy", "never"), "no"),
                MaximumRetryCount=int(policy.get("max_attempts") or 0),
            ),
            PortBindings=_port_map(row),
        ),
        "Mounts": [
            Fields(
                Type="volume",
                Name=mount["volume_id"],
                Destination=mount["mount_path"],
                Driver="local",
                RW=not mount.get("readonly", False),
            )
            for mount in row.get("volumes") or ()
        ],
        "Config": Fields(
            Image=row["image"],
            Env=[f"{name}={value}" for name, value in (row.get("env") or {}).items()],
            Labels=dict(row.get("tags") or {}),
        ),
        "NetworkSettings": Fields(
            IPAddress=network.get("ip") or "" if state != "Stopped" else "",
            MacAddress=network.get("mac") or "",
            Ports=_port_map(row),
            Networks={
                _network_name(row): Fields(IPAddress=network.get("ip") or "", MacAddress=network.get("mac") or "")
            }
            if network.get("enabled")
            else {},
        ),
    }
    return Fields(found)


def image_row(row: Mapping[str, Any]) -> Fields:
    """A line of ``docker images``."""
    repository, tag = _repository_and_tag(row["name"])
    return Fields(
        ID=row["digest"].partition(":")[2][:_SHORT],
        Repository=repository,
        Tag=tag,
        Digest=row["digest"] or "<none>",
        CreatedSince=f"{_ago(row['created_at'])} ago",
        CreatedAt=_local(row["created_at"]),
        Size=size(row.get("size_bytes")),
    )


def image(row: Mapping[str, Any]) -> Fields:
    """``docker image inspect``."""
    repository, tag = _repository_and_tag(row["name"])
    system, _, processor = str(row.get("platform") or "linux/amd64").partition("/")
    return Fields(
        Id=row["digest"],
        RepoTags=[f"{repository}:{tag}"] if tag != "<none>" else [],
        RepoDigests=[f"{repository}@{row['digest']}"],
        Created=row["created_at"],
        Size=row.get("size_bytes") or 0,
        Os=system,
        Architecture=processor.partition("/")[0],
        Config=Fields(
            Env=[f"{name}={value}" for name, value in (row.get("env") or {}).items()],
            Entrypoint=list(row.get("entrypoint") or ()),
            Cmd=list(row.get("cmd") or ()),
            WorkingDir=row.get("working_dir") or "",
        ),
    )


def volume(row: Mapping[str, Any]) -> Fields:
    """A line of ``docker volume ls``."""
    tags = dict(row.get("tags") or {})
    return Fields(
        Name=row["name"],
        Driver="local",
        Scope="local",
        Size=f"{row['size_gb']}GB",
        Links=str(len(row.get("attachments") or ())),
        Labels=_labels(tags),
        Label=Method(lambda name="": tags.get(name, "")),
    )


def one_volume(row: Mapping[str, Any]) -> Fields:
    """``docker volume inspect``."""
    labels = dict(row.get("tags") or {})
    return Fields(
        Name=row["name"], Driver="local", Scope="local", CreatedAt=row["created_at"], Labels=labels, Options={}
    )


def versions(capabilities: Callable[[], Mapping[str, Any]]) -> Fields:
    """``docker version``; the server is asked if a template names it."""

    def server() -> Fields:
        found = capabilities()
        return Fields(Version=found["server"]["version"], **_system(found))

    return Fields(Client=Fields(Version=__version__), Server=Lazy(server))


def info(found: Mapping[str, Any]) -> Fields:
    """``docker info``, of what ``hypeman info`` has asked for."""
    states = [STATES.get(row["state"]) for row in found["instances"]]
    return Fields(
        Containers=len(states),
        ContainersRunning=states.count("running"),
        ContainersPaused=states.count("paused") + states.count("standby"),
        ContainersStopped=states.count("exited"),
        Images=found["counts"]["images"],
        NCPU=found["resources"]["cpu"]["capacity"],
        MemTotal=found["resources"]["memory"]["capacity"],
        ServerVersion=found["capabilities"]["server"]["version"],
        OSType=_system(found["capabilities"])["Os"],
        Architecture=_system(found["capabilities"])["Arch"],
    )


def _system(capabilities: Mapping[str, Any]) -> dict[str, str]:
    host = capabilities["host"]
    return {"Os": host.get("os", "linux"), "Arch": host.get("arch", "")}


def _docker_state(row: Mapping[str, Any]) -> str:
    state = str(row["state"])
    return STATES.get(state, state.lower())


def _state(row: Mapping[str, Any]) -> Fields:
    status = _docker_state(row)
    health = (row.get("health_status") or {}).get("status", "disabled")
    return Fields(
        Status=status,
        Running=status == "running",
        Paused=status in ("paused", "standby"),
        Restarting=False,
        OOMKilled=str(row.get("exit_message") or "").endswith("- OOM"),
        Dead=status == "dead",
        ExitCode=int(row.get("exit_code") or 0),
        Error=row.get("state_error") or "",
        StartedAt=row.get("started_at") or _ZERO_TIME,
        FinishedAt=row.get("stopped_at") or _ZERO_TIME,
        Health=None if health == "disabled" else Fields(Status=health),
    )


def _status(row: Mapping[str, Any]) -> str:
    """``Up 5 minutes (healthy)``, ``Exited (0) 3 hours ago``."""
    state = _docker_state(row)
    if state in ("running", "paused"):
        health = (row.get("health_status") or {}).get("status", "disabled")
        more = "" if health == "disabled" else f" ({'health: starting' if health == 'starting' else health})"
        return f"Up {_ago(row.get('started_at') or row['created_at'])}{more}" + " (Paused)" * (state == "paused")
    if state == "exited":
        return f"Exited ({int(row.get('exit_code') or 0)}) {_ago(row.get('stopped_at') or row['created_at'])} ago"
    return state.capitalize()


def _ago(timestamp: str) -> str:
    """As in ``5 minutes``."""
    seconds = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(timestamp)).total_seconds())
    for word, length in (("year", 365 * 86400), ("month", 30 * 86400), ("week", 7 * 86400), ("day", 86400)):
        if seconds >= 2 * length:
            return f"{int(seconds // length)} {word}s"
    for word, length in (("hour", 3600), ("minute", 60), ("second", 1)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {word}{'s' * (count != 1)}"
    return "Less than a second"


def _local(timestamp: str) -> str:
    return f"{datetime.fromisoformat(timestamp).astimezone():%Y-%m-%d %H:%M:%S %z %Z}"


def _labels(tags: Mapping[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in sorted(tags.items()))


def _network_name(row: Mapping[str, Any]) -> str:
    network = row.get("network") or {}
    return str(network.get("name") or "default") if network.get("enabled") else "none"


def _repository_and_tag(name: str) -> tuple[str, str]:
    """As Docker shows an image's name: without its default registry."""
    short = name.removeprefix("docker.io/library/").removeprefix("docker.io/").partition("@")[0]
    base, colon, tag = short.rpartition(":")
    return (base, tag) if colon and "/" not in tag else (short, "<none>")


def _port_texts(row: Mapping[str, Any]) -> list[str]:
    """``0.0.0.0:8080->80/tcp``, one for each."""
    return [f"{each['host']}->{each['guest']}" for mapping in row.get("ports") or () for each in port_rows(mapping)]


def _port_map(row: Mapping[str, Any]) -> dict[str, list[Fields]]:
    found: dict[str, list[Fields]] = {}
    for mapping in row.get("ports") or ():
        for each in port_rows(mapping):
            address, _, port = each["host"].rpartition(":")
            found.setdefault(each["guest"], []).append(Fields(HostIp=address.strip("[]"), HostPort=port))
    return found
