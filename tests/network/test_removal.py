"""`hypeman clean-host`: what a server leaves when it ends is taken away, and nothing else."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from hypeman.config import Config
from hypeman.errors import HypemanError
from hypeman.removal import clean_host
from tests.network.lab import Lab, in_namespace, sh


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
