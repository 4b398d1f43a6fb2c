"""Run inside the virtual host by test_limits.py: a guest under the server that systemd started."""

from __future__ import annotations

import time
from pathlib import Path

import httpx

from hypeman.host.cgroups import UNDER_SYSTEMD
from tests.real.appliance import IMAGE, busybox_archive

SOCKET = "/run/hypeman/hypeman.sock"


def main() -> None:
    with httpx.Client(transport=httpx.HTTPTransport(uds=SOCKET), base_url="http://hypeman", timeout=900) as client:
        client.post("/images/import", params={"name": IMAGE}, content=busybox_archive()).raise_for_status()
        image = f"/images/{IMAGE.replace('/', '%2F').replace(':', '%3A')}"
        while (found := client.get(image).json())["status"] != "ready":
            assert found["status"] != "failed", found
            time.sleep(0.5)
        wanted = {"name": "one", "image": IMAGE, "size": "128MB", "vcpus": 1, "overlay_size": "64MB"}
        client.post("/instances", json=wanted).raise_for_status()
        for _ in range(3):  # 5 minutes each, the most that a request may wait
            answer = client.get("/instances/one/wait", params={"state": "Running", "timeout": "300s"}).json()
            if not answer["timed_out"]:
                break
        assert answer["state"] == "Running", answer
        one = client.get("/instances/one").json()["id"]
        group = UNDER_SYSTEMD / one
        pids = (group / "cgroup.procs").read_text().split()
        assert len(pids) == 1, pids
        status = Path(f"/proc/{pids[0]}/status").read_text()
        assert "Seccomp:\t2" in status and "NoNewPrivs:\t1" in status, status
        assert (group / "memory.max").read_text().strip() != "max"
        client.post("/instances/one/standby").raise_for_status()
        client.post("/instances/one/restore").raise_for_status()
        client.delete("/instances/one").raise_for_status()
        assert not group.exists()
    print("under the units: ok")


main()
