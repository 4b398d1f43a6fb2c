"""What images and people expect, as a table: what they do, what Docker gives (or the contract), what our guests give.

    python -m tests.habits.rows > tests/habits/README.md

Each row is a command in a guest and its output; ``tests/habits/test_guest.py`` runs them all in two boots.
"""

from __future__ import annotations

from typing import NamedTuple

from tests.habits import typed
from tests.habits.image import LONG_NAME


class Row(NamedTuple):
    what: str
    docker: str
    """What Docker gives, in words; with "better:" where we give more."""
    script: str
    gives: str
    """The output of ``script``, without white space at its end; or a part of it, after "…"."""
    user: str = ""


def _user(user: str, docker: str, gives: str) -> Row:
    shown = user if len(user) < 40 else f"{user[:3]}… ({len(user)} letters)"
    return Row(
        f"USER `{shown or '(empty)'}`", docker, "exec 2> /dev/null; echo $(id -u) $(id -g) $(id -G) $HOME", gives, user
    )


def _refused(user: str, docker: str) -> Row:
    return Row(f"USER `{user}`", f"error: {docker}", "true", f"… {docker}", user)


FIRST_BOOT = (
    _user("", "root, as /etc/passwd has it", "0 0 0 /root"),
    _user("bob", "its groups, though the lines are longer than 3000 letters", "1000 1000 1000 77 /home/bob"),
    _user("1000", "the same by number", "1000 1000 1000 77 /home/bob"),
    _user("+1000", "the same: Go reads a sign", "1000 1000 1000 77 /home/bob"),
    _user("bob:", "the same: an empty group is none", "1000 1000 1000 77 /home/bob"),
    _user("bob:video", "that group alone", "1000 44 44 /home/bob"),
    _user("bob:44", "that group alone", "1000 44 44 /home/bob"),
    _user("1000:4444", "a group without a line", "1000 4444 4444 /home/bob"),
    _user(":55", "root with another group", "0 55 55 /root"),
    _user(":video", "root with another group", "0 44 44 /root"),
    _user("bob:9", "a group's name wins over a number", "1000 90 90 /home/bob"),
    _user("4242", "group 0, home /", "4242 0 0 /"),
    _user("4242:4243", "as given, home /", "4242 4243 4243 /"),
    _user("short", "missing fields are 0 and /", "3000 0 0 /"),
    _user(LONG_NAME, "names of any length", "2000 2000 2000 /opt"),
    _refused("nobody-here", "unable to find user nobody-here: no matching entries in passwd file"),
    _refused("bob:nogroup", "unable to find group nogroup: no matching entries in group file"),
    _refused("-1", "user -1: uids and gids must be in range 0-2147483647"),
    _refused("99999999999", "user 99999999999: uids and gids must be in range 0-2147483647"),
    Row(
        "VOLUME that the image lacks",
        "exists, 0755 root",
        "stat -c '%u:%g %a' /data /data/deep/er",
        "0:0 755\n0:0 755",
    ),
    Row(
        "VOLUME with content in the image",
        "content, owner and mode kept",
        "cat /var/lib/app/file; stat -c '%u:%g %a' /var/lib/app /var/lib/app/file",
        "of the image\n1000:1000 2750\n1000:1000 644",
    ),
    Row("VOLUME on an empty directory", "owner and mode kept", "stat -c '%u:%g %a' /opt/empty", "1000:44 700"),
    Row(
        "an overlay in a VOLUME (Docker and Podman inside)",
        "works: a volume is on the host's disk",
        "cd /data && mkdir l u w m && mount -t overlay -o lowerdir=l,upperdir=u,workdir=w none m && touch m/x && ls u; "
        "umount m; echo kept > /data/kept",
        "x",
    ),
    Row(
        "VOLUME with a name that is taken by a file",
        "error; better: the image runs",
        "cat /etc/inittab | head -n 1",
        "… sysinit",
    ),
    Row("HOSTNAME, PATH, umask", "set", "echo $HOSTNAME $PATH; umask", "box /bin\n0022"),
    Row("the image's /run", "visible", "stat -c '%u %a' /run/app", "1000 755"),
    Row("/etc/mtab", "the mount table", "readlink /etc/mtab", "/proc/mounts"),
    Row("`ulimit -n`", "1048576 (up to version 24)", "ulimit -n; ulimit -Hn", "1048576\n1048576"),
    Row("`ulimit -u`", "unlimited", "ulimit -u", "unlimited", user="bob"),
    Row("`ulimit -l`", "8 MB; better: unlimited", "ulimit -l", "unlimited", user="bob"),
    Row("`ulimit -c`", "unlimited; off here, may be raised", "ulimit -c; ulimit -Hc", "0\nunlimited"),
    Row(
        "/dev/shm",
        "64 MB; better: half of the memory if that is more",
        "df -k /dev/shm | awk 'END {print ($2 >= 65536)}'",
        "1",
    ),
    Row("vm.max_map_count", "the host's; 262144 wanted by search engines", "cat /proc/sys/vm/max_map_count", "262144"),
    Row(
        "inotify",
        "the host's: 128 instances, 65536 watches",
        "cat /proc/sys/fs/inotify/max_user_instances /proc/sys/fs/inotify/max_user_watches",
        "8192\n1048576",
    ),
    Row("fs.file-max", "unlimited (systemd's)", "cat /proc/sys/fs/file-max", "9223372036854775807"),
    Row("fs.aio-max-nr", "the host's: 65536", "cat /proc/sys/fs/aio-max-nr", "1048576"),
    Row("port 80 without root", "allowed", "httpd -p 127.0.0.1:80 -h /tmp && echo ok", "ok", user="bob"),
    Row("ping without root", "allowed", "ping-socket && echo ok", "ok", user="bob"),
    Row("::1", "only if it works", "ip addr | grep -c inet6", "0"),
    Row("/dev/fuse, /dev/net/tun", "0666 (udev's)", "stat -c %a /dev/fuse /dev/net/tun", "666\n666"),
    Row("loop devices", "there if asked for", "truncate -s 1M /tmp/l && losetup -f /tmp/l && losetup -a", "… /tmp/l"),
    Row("/dev/stdout", "writable for any user", "echo out > /dev/stdout", "out", user="bob"),
    Row(
        "a process that lost its parent",
        "reaped by process 1",
        "sh -c 'sleep 0.1 &'; sleep 1; ps -o stat | grep -c Z",
        "0",
    ),
    Row("`cat /proc/1/comm`", "the program; the agent here unless it is an init", "cat /proc/1/comm", "init"),
    Row("`> /proc/1/fd/1`", "in the log", "echo 'to fd 1 of process 1' > /proc/1/fd/1", ""),
    Row("`> /dev/console`", "in the log (with a terminal)", "echo to the console > /dev/console", ""),
    Row("bytes that are no text", "in the log", "printf '\\377\\376 bytes\\n' > /proc/1/fd/1", ""),
)

IN_THE_LOG = (b"to fd 1 of process 1\n", b"to the console\n", b"\xff\xfe bytes\n")
"""What the rows above leave in the log."""

SECOND_BOOT = (
    Row("an entry script that executes /sbin/init", "process 1", "readlink /proc/1/exe", "/bin/busybox"),
    Row("VOLUME after a restart", "content kept", "cat /data/kept; stat -c '%u:%g %a' /opt/empty", "kept\n1000:44 700"),
    Row("`--ulimit nofile=100:200`", "label or tag hypeman.ulimit.nofile", "ulimit -n; ulimit -Hn", "100\n200"),
    Row("`--sysctl net.core.somaxconn=99`", "label or tag hypeman.sysctl.…", "cat /proc/sys/net/core/somaxconn", "99"),
    Row("`--shm-size 80m`", "label or tag hypeman.shm-size", "df -k /dev/shm | awk 'END {print $2}'", "81920"),
    Row("`exec` beside an init", "in its namespaces and control group", "cat /proc/self/cgroup", "0::/"),
    Row("mounts beside an init", "can be shared further", "grep -c ' / / .* shared:' /proc/self/mountinfo", "1"),
)

DOCKER_NEEDS = """
    NAMESPACES NET_NS PID_NS IPC_NS UTS_NS CGROUPS CGROUP_CPUACCT CGROUP_DEVICE CGROUP_FREEZER CGROUP_SCHED CPUSETS
    MEMCG KEYS VETH BRIDGE BRIDGE_NETFILTER IP_NF_FILTER IP_NF_MANGLE IP_NF_TARGET_MASQUERADE IP_NF_RAW IP_NF_NAT NF_NAT
    IP6_NF_FILTER IP6_NF_MANGLE IP6_NF_TARGET_MASQUERADE IP6_NF_RAW IP6_NF_NAT
    NETFILTER_XT_MATCH_ADDRTYPE NETFILTER_XT_MATCH_CONNTRACK NETFILTER_XT_MATCH_IPVS NETFILTER_XT_MARK
    POSIX_MQUEUE CGROUP_BPF
    USER_NS SECCOMP SECCOMP_FILTER CGROUP_PIDS BLK_CGROUP BLK_DEV_THROTTLING CGROUP_PERF CGROUP_HUGETLB NET_CLS_CGROUP
    CGROUP_NET_PRIO CFS_BANDWIDTH FAIR_GROUP_SCHED IP_NF_TARGET_REDIRECT IP_VS IP_VS_NFCT IP_VS_PROTO_TCP
    IP_VS_PROTO_UDP
    IP_VS_RR EXT4_FS EXT4_FS_POSIX_ACL EXT4_FS_SECURITY VXLAN BRIDGE_VLAN_FILTERING CRYPTO CRYPTO_AEAD CRYPTO_GCM
    CRYPTO_SEQIV CRYPTO_GHASH XFRM XFRM_USER XFRM_ALGO INET_ESP NETFILTER_XT_MATCH_BPF IPVLAN MACVLAN DUMMY
    NF_NAT_FTP NF_CONNTRACK_FTP NF_NAT_TFTP NF_CONNTRACK_TFTP OVERLAY_FS
"""
"""What Docker's own script asks a kernel for, required and optional, except for SELinux, AppArmor, RT_GROUP_SCHED and
storage drivers other than overlay (``packaging/kernel/config`` says why), and options that kernels of today lack."""

PODMAN_NEEDS = (
    "FUSE_FS TUN BLK_DEV_LOOP NF_TABLES NF_TABLES_INET NFT_COMPAT NFT_MASQ NFT_NAT NFT_CT NFT_FIB_INET IP_NF_IPTABLES"
)


def render() -> str:
    """The table as a document."""
    lines = [
        "# Habits",
        "",
        "What images and people do, what Docker gives, and what guests give, as `test_guest.py` checks on real ones.",
        "Written by `python -m tests.habits.rows`; outputs are shortened.",
        "",
        "| what | Docker, or the contract | here |",
        "|---|---|---|",
    ]
    for row in (*FIRST_BOOT, *SECOND_BOOT):
        given = " / ".join(row.gives.split("\n")) or "in the log"
        lines.append(
            f"| {row.what} | {row.docker} | {given if len(given) < 60 else given[:57] + '…'} |".replace("…  ", "… ")
        )
    lines.append("| kernel options that Docker's and Podman's scripts ask for | set | set, on our kernel |")
    lines += [
        "",
        "What is typed, as `test_typed.py` checks, with running `web`, stopped `old`, image `nginx:1`, volume `data`.",
        "",
    ]
    lines += typed.render()
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render(), end="")
