"""Keys of the Compose specification that are not carried out: none is dropped silently. Pure.

A place is where the key stands in a file (``services.build``). Keys that are asked for are carried out, make no
difference (NO_DIFFERENCE), are left out with a warning (IGNORED), or are refused with what to do instead (INSTEAD).
``tests/cli/compose_conformance.py`` tries every key of the published schema.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

from hypeman.cli.compose.model import ComposeError

NO_DIFFERENCE: Mapping[str, frozenset[str]] = {
    "": frozenset(["version"]),
    "services": frozenset(
        """annotations attach cap_add cgroup cgroup_parent expose init isolation logging oom_score_adj stdin_open
        tty""".split()  # noqa: SIM905
    ),
    "services.build": frozenset(["isolation"]),
    "services.configs": frozenset(),
    "services.deploy": frozenset(["labels", "mode", "endpoint_mode", "placement", "update_config", "rollback_config"]),
    "services.env_file": frozenset(["format"]),
    "services.networks": frozenset(["priority", "gw_priority", "use_service_name_alias"]),
    "services.ports": frozenset(["name", "mode", "app_protocol"]),
    "services.volumes": frozenset(["consistency", "bind", "tmpfs"]),
    "services.volumes.bind": frozenset(["create_host_path", "propagation", "recursive", "selinux"]),
    "services.volumes.volume": frozenset(["labels"]),
    "services.volumes.tmpfs": frozenset(["size", "mode"]),
    "networks": frozenset(["name", "attachable", "labels"]),
    "volumes": frozenset(["labels"]),
    "secrets": frozenset(["name", "labels"]),
    "configs": frozenset(["name", "labels"]),
}
"""Keys that change nothing for a VM, or say what is so anyway."""

_LIMITS = "the VM's size and CPUs are its limits: deploy.resources.limits"
_OWN_KERNEL = "each instance has a kernel of its own"
_ONE_NAME = "an instance's names are its own and its service's"
_ADDRESS = "an instance has one address of the host's network"
IGNORED: Mapping[str, Mapping[str, str]] = {
    "services": {
        "blkio_config": "disk_io_bps of the API limits the disk",
        "cap_drop": "the boundary is the VM's, and root in it has every capability",
        "container_name": "an instance is called STACK-SERVICE",
        "cpu_percent": _LIMITS,
        "cpu_rt_period": _LIMITS,
        "cpu_rt_runtime": _LIMITS,
        "cpu_shares": "VMs have equal weight for each CPU of theirs",
        "cpuset": "the host's scheduler decides",
        "device_cgroup_rules": _OWN_KERNEL,
        "mac_address": "the server chooses it",
        "mem_swappiness": "guests have no swap",
        "memswap_limit": "guests have no swap",
        "oom_kill_disable": _OWN_KERNEL,
        "pids_limit": "ulimits.nproc limits the processes of a user",
        "pull_refresh_after": "images are pulled if they are missing; hypeman pull checks for newer ones",
        "read_only": "the instance has a writable layer of its own",
        "runtime": "every service is a VM",
        "security_opt": "the boundary is the VM's",
        "stop_grace_period": "the server decides how long a guest may take to stop",
        "stop_signal": "guests are stopped with the image's STOPSIGNAL",
        "tmpfs": "the directories are on the instance's own disk",
        "userns_mode": "users of a VM are none of the host's",
    },
    "services.build": {
        "privileged": "the VM that builds has a kernel of its own",
        "shm_size": "steps have half of the memory of the VM that builds",
        "ulimits": "steps have the limits of the VM that builds",
    },
    "services.depends_on": {"restart": "services do not restart with those that they depend on"},
    "services.deploy.resources.limits": {"pids": "ulimits.nproc limits the processes of a user"},
    "services.deploy.resources.reservations": {"generic_resources": "a host has its CPUs and memory"},
    "services.healthcheck": {"start_interval": "interval applies from the start"},
    "services.networks": {
        "driver_opts": _ADDRESS,
        "interface_name": "an instance has one interface",
        "mac_address": "the server chooses it",
    },
    "services.secrets": dict.fromkeys(["uid", "gid", "mode"], "the guest does not hold the secret"),
    "services.volumes.volume": {"nocopy": "an empty volume gets what the image has at its place"},
    "networks": {
        "driver": "instances are in the host's network",
        "driver_opts": "instances are in the host's network",
        "enable_ipv4": "guests have IPv4",
        "enable_ipv6": "guests have IPv4 only",
        "ipam": "the server chooses addresses: network.subnet in its configuration",
    },
}
"""Keys that are left out with a warning: the service works without them."""

_HOOK = "let the command or the entrypoint do it"
_REGISTER = "register them (hypeman device register), and name them in hypeman run --device"
_BUILD = "hypeman build --help lists what a build can have"
_FROM_HERE = "environment or file says where its value is"
INSTEAD: Mapping[str, Mapping[str, str]] = {
    "": {
        "models": "run the model as a service, or name its address in environment",
        "jobs": "a service with restart: no and depends_on does it",
    },
    "services": {
        "credential_spec": "it is for Windows",
        "devices": _REGISTER,
        "dns": "guests look names up at the host, which asks network.dns_server",
        "dns_opt": "guests look names up at the host",
        "dns_search": "write names in full; guests look them up at the host",
        "external_links": "services of other stacks are called STACK-SERVICE",
        "extra_hosts": "guests look names up at the host; see network.domain in the server's configuration",
        "gpus": _REGISTER,
        "group_add": "user may name a group: USER:GROUP",
        "ipc": _OWN_KERNEL,
        "models": "run the model as a service, or name its address in environment",
        "pid": _OWN_KERNEL,
        "post_start": _HOOK,
        "pre_start": f"{_HOOK}, or a service with condition: service_completed_successfully",
        "pre_stop": _HOOK,
        "privileged": "a VM has a kernel of its own: root in it has every capability there",
        "provider": "only images run",
        "umask": "set it in the command: sh -c 'umask 077; exec …'",
        "use_api_socket": "hypeman token issues a token for the API",
        "uts": _OWN_KERNEL,
        "volumes_from": "name the volumes in both services",
    },
    "services.build": {
        "additional_contexts": "put it into the context, or name an image in COPY --from",
        "entitlements": "steps run as root in a VM of their own",
        "extra_hosts": "steps look names up at the host",
        "no_cache_filter": "no_cache: true runs every step",
        "ssh": "hypeman build --ssh ID=KEYFILE, then name the image",
    },
    "services.deploy.resources.reservations": {"devices": _REGISTER},
    "services.develop.watch.exec": dict.fromkeys(
        ["user", "privileged", "working_dir", "environment"], "write it into the command, as in sh -c"
    ),
    "services.networks": {
        "aliases": _ONE_NAME,
        "ipv4_address": "the server chooses it; use the name",
        "ipv6_address": "guests have IPv4 only",
        "link_local_ips": _ADDRESS,
    },
    "services.volumes.volume": {"subpath": "a volume is mounted as a whole"},
    "networks": {
        "internal": "egress rules (hypeman update egress-rules) decide what instances reach",
        "external": "leave it out: stacks reach each other unless networks keep services apart",
    },
    "volumes": {"driver_opts": "volumes are disks of this host, as hypeman volume create makes them"},
    "secrets": {
        "driver": _FROM_HERE, "driver_opts": _FROM_HERE, "template_driver": _FROM_HERE, "external": _FROM_HERE,
    },
    "configs": {
        "external": "content, environment or file says what is in it",
        "template_driver": "variables of the file are replaced in content",
    },
    "include": {"env_file": "put the variables into .env of this folder"},
}  # fmt: skip
"""Keys that are refused, with what to do."""

UNKNOWN = "the Compose specification has no such key"
_TRUE_BY_DEFAULT = frozenset(["enable_ipv4"])


def asked(key: str, value: Any) -> bool:
    """Whether the value asks for something: not for a key that is empty or switched off."""
    return value is False if key in _TRUE_BY_DEFAULT else value not in (None, False, "", [], {})


def left_out(place: str, where: str, value: Mapping[str, Any], done: Set[str]) -> Iterator[str]:
    """A warning for each key of ``value`` that is ignored; ``done`` are those that are carried out. ``where`` names it
    in messages. Raises ComposeError for a key that is refused."""
    for key in value:
        if key in done or key.startswith("x-") or key in NO_DIFFERENCE.get(place, ()):
            continue
        name = f"{where}.{key}" if where else key
        ignored, instead = IGNORED.get(place, {}).get(key), INSTEAD.get(place, {}).get(key)
        if not ignored and not instead:
            raise ComposeError(f"{name} is not supported: {UNKNOWN}")
        if asked(key, value[key]):
            if instead:
                raise ComposeError(f"{name} is not supported: {instead}")
            yield f"{name} is ignored: {ignored}"
