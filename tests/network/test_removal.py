"""`hypeman clean-host`: what a server leaves when it ends is taken away, and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from hypeman.config import Config, NetworkConfig
from hypeman.errors import HypemanError
from hypeman.host.links import Links
from hypeman.host.rules import Rules
from hypeman.network.service import Network
from hypeman.removal import clean_host
from tests.network.lab import Lab, in_namespace, set_up_uplink, sh
from tests.network.test_ports import WEB, publish

SWITCHES = "/proc/sys/net/ipv4/conf/*/forwarding /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv4/conf/*/route_localnet"


def _host() -> str:
    """All that the appliance could have changed in the network of a host."""
    looks = ["ip -o link | sed 's/^[0-9]*//; s/state [A-Z]*//'", "ip -o address", "ip route show table all", "ip rule",
             "nft list ruleset", f"grep -H . {SWITCHES}", "ss -Hltun", "ip neigh show nud permanent"]  # fmt: skip
    return "\n".join(sh(look) for look in looks)


@in_namespace
async def test_links_rules_and_gateway_go(lab: Lab) -> None:
    with TemporaryDirectory() as folder:
        config = Config(data_dir=str(Path(folder, "data")))
        await lab.network.attach(lab.lease(download_bps=10**6, upload_bps=10**6))
        sh("nft add table inet somebodys")
        sh("ip tuntap add hmm mode tap")
        assert "hm-guest1" in sh("ip -o link")
        try:
            await clean_host(config)
        except HypemanError as error:
            assert "another hypeman server" in error.message
        else:
            raise AssertionError("a server keeps its network")
        lab.network.aclose()
        await clean_host(config)
        await clean_host(config)
        left = sh("ip -o link")
        assert "hm-" not in left and "hmu-" not in left and "hmm" in left and "up0" in left
        assert "10.100.0.1" not in sh("ip -o address")
        assert sh("nft list tables").split("\n")[0] == "table inet somebodys"


@in_namespace
async def test_purging_leaves_the_network_as_it_was() -> None:
    """Also after a server that was killed, and one interface that was its uplink before."""
    sh("ip link set lo up")
    worlds = [set_up_uplink()]
    with TemporaryDirectory() as folder:
        config = Config(data_dir=str(Path(folder, "data")))
        before = _host()
        async with server() as lab:
            guest = await lab.guest(download_bps=10**6, upload_bps=10**6)
            await publish(lab, guest, WEB)
            assert "up0/forwarding:1" in _host()
            lab.network.aclose()
        async with server():
            pass
        await clean_host(config)
        assert _host() == before
    worlds[0].close()


@asynccontextmanager
async def server() -> AsyncIterator[Lab]:
    """The network part of a server, which does not tidy up."""
    links, rules = Links(), Rules()
    network = Network(NetworkConfig(), links=links, rules=rules)
    await network.start([])
    built = Lab(network, links, rules, None)  # type: ignore[arg-type]
    built._wires.clear()
    try:
        yield built
    finally:
        built.close()
        network.aclose()
        links.close()
        rules.close()


@in_namespace
async def test_a_host_that_became_a_router_stays_one(lab: Lab) -> None:
    with TemporaryDirectory() as folder:
        sh("sysctl -qw net.ipv4.ip_forward=1")
        lab.network.aclose()
        await clean_host(Config(data_dir=str(Path(folder, "data"))))
        assert sh("sysctl -n net.ipv4.ip_forward net.ipv4.conf.up0.forwarding").split() == ["1", "1"]


@in_namespace
async def test_what_forwarded_before_us_still_does() -> None:
    sh("ip link set lo up")
    world = set_up_uplink()
    sh("sysctl -qw net.ipv4.conf.up0.forwarding=1")
    with TemporaryDirectory() as folder:
        async with server():
            pass
        await clean_host(Config(data_dir=str(Path(folder, "data"))))
    assert sh("sysctl -n net.ipv4.ip_forward net.ipv4.conf.up0.forwarding").split() == ["0", "1"]
    world.close()
