"""A program that answers like Cloud Hypervisor or like Firecracker, and has no VM: for tests of their drivers.

Under the name ``jailer`` it is Firecracker's jailer, with no walls: the program is started in its root directory,
as its user and with an empty environment.

Started by the driver under test as the real one would be, with the real one's arguments, as its own user,
with nothing but the standard library. It takes the requests of the published API, refuses unknown ones and
those that come in the wrong state, and appends each to ``<run_dir>/requests`` for tests to look at. Its
"guest" dials the host as the agent does and speaks the lines of guest_init.c.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path

CLOUD_HYPERVISOR = "cloud-hypervisor" in Path(sys.argv[0]).name


class Refused(Exception):
    """Answered with 400 or 500."""


class Vm:
    """What both kinds have."""

    def __init__(self) -> None:
        self.state = "none"
        self.disks: dict[str, str] = {}
        self.size = 0
        self.plugged = 0
        self.lent = 0
        self.memory = {"kept": "", "count": 0}
        self.events = -1
        self.deaf = False

    def answer(self, question: str) -> str | None:
        word, _, rest = question.partition(" ")
        if word == "ping":
            return f"pong {rest}"
        if word == "count":
            self.memory["count"] += 1  # type: ignore[operator]
            return str(self.memory["count"])
        if word == "keep":
            self.memory["kept"] = rest
            return "kept"
        if word == "kept":
            return str(self.memory["kept"])
        if word == "disks":
            return " ".join(f"{name}:{os.stat(path).st_size // 512}" for name, path in self.disks.items())
        if word == "read":
            with open(self.disks[rest], "rb") as file:
                return file.read(16).rstrip(b"\0").decode()
        if word == "memory":
            return f"MemTotal: {(self.size + self.plugged) // 1024} kB"
        if word == "free":
            return f"MemFree: {(self.size - self.lent) // 1024} kB"
        self.end(word)
        return None

    def end(self, how: str) -> None:
        if CLOUD_HYPERVISOR and how != "poweroff":
            self.tell("vm", "rebooting")  # and it boots again unless it is killed
            return
        if CLOUD_HYPERVISOR:
            self.tell("vm", "shutdown")
        os._exit(0)

    def tell(self, source: str, event: str) -> None:
        body = {"timestamp": {"secs": 0, "nanos": 0}, "source": source, "event": event, "properties": None}
        os.write(self.events, json.dumps(body, indent=2).encode() + b"\n\n")

    def run_guest(self) -> None:
        """Dial the host, answer, dial again; stand still while paused."""
        while True:
            try:
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect("vsock.sock_1024")
                    for line in sock.makefile("rb"):
                        while self.state != "Running" or self.deaf:
                            time.sleep(0.005)
                        if (said := self.answer(line.decode().strip())) is not None:
                            sock.sendall(said.encode() + b"\n")
            except OSError:
                pass
            time.sleep(0.01)

    def want(self, *states: str) -> None:
        if self.state not in states:
            raise Refused(f"not in state {self.state}")

    def run(self) -> None:
        if self.state == "none":
            threading.Thread(target=self.run_guest, daemon=True).start()
        self.state = "Running"


def open_disk(path: str, *, readonly: bool) -> str:
    """As the real ones do: with the rights of this process, at this moment. The guest reads through it."""
    return f"/proc/self/fd/{os.open(path, os.O_RDONLY if readonly else os.O_RDWR)}"


class CloudHypervisor(Vm):
    fds: list[int] = []
    gathering = 0
    """So often it refuses to save, since it was restored lazily."""

    def handle(self, method: str, target: str, body: dict) -> object:  # type: ignore[type-arg]
        match method, target.removeprefix("/api/v1/"):
            case "GET", "vmm.ping":
                return {"version": "v53.0"}
            case "GET", "vm.info":
                tree = {name: {"id": name} for name in self.disks}
                return {"config": {}, "state": self.state, "memory_actual_size": self.size + self.plugged,
                        "device_tree": tree}  # fmt: skip
            case "PUT", "vm.create":
                self.want("none")
                os.close(os.open(body["payload"]["kernel"], os.O_RDONLY))
                self.size = body["memory"]["size"]
                self.take_disks(body["disks"])
            case "PUT", "vm.add-net":
                if len(self.fds) != 1:
                    raise Refused("no TAP came with it")
                if "mtu" in body:
                    raise Refused("Operation not permitted")
            case "PUT", "vm.boot":
                self.run()
                return None
            case "PUT", "vm.pause":
                self.want("Running")
                self.state = "Paused"
            case "PUT", "vm.resume":
                self.want("Paused")
                self.state = "Running"
            case "PUT", "vm.snapshot":
                self.want("Paused")
                if self.gathering:
                    self.gathering -= 1
                    raise Refused("VM on-demand memory restore is still in progress")
                self.save(Path(body["destination_url"].removeprefix("file://")))
            case "PUT", "vm.restore":
                self.want("none")
                self.load(Path(body["source_url"].removeprefix("file://")))
                self.gathering = 2 if body["memory_restore_mode"] == "OnDemand" else 0
                if len(self.fds) != len(body.get("net_fds", [])):
                    raise Refused("not a TAP for each interface")
            case "PUT", "vm.add-disk":
                self.take_disks([body])
                return {"id": body["id"], "bdf": "0000:00:09.0"}
            case "PUT", "vm.remove-device":
                if body["id"] not in self.disks:
                    raise Refused(f"Failed to find device corresponding to the given identifier: {body['id']}")
                threading.Timer(0.05, lambda: self.disks.pop(body["id"])).start()
            case "PUT", "vm.resize-disk":
                os.ftruncate(int(self.disks[body["id"]].rpartition("/")[2]), body["desired_size"])
            case "PUT", "vm.resize":
                if "desired_ram" in body:
                    self.plugged = body["desired_ram"] - self.size
                self.lent = body.get("desired_balloon", self.lent)
            case _:
                raise Refused(f"no such request: {method} {target}")
        return None

    def take_disks(self, disks: list[dict]) -> None:  # type: ignore[type-arg]
        for disk in disks:
            self.disks[disk["serial"]] = open_disk(disk["path"], readonly=disk["readonly"])

    def save(self, directory: Path) -> None:
        names = {name: f"disk-{name}" for name in self.disks}
        (directory / "config.json").write_text(json.dumps({"disks": names, "size": self.size}))
        (directory / "state.json").write_text(json.dumps({**self.memory, "plugged": self.plugged}))
        (directory / "memory-ranges").write_bytes(b"\0" * 4096)

    def load(self, directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        self.memory = json.loads((directory / "state.json").read_text())
        self.plugged = self.memory.pop("plugged")  # type: ignore[assignment]
        os.open(directory / "memory-ranges", os.O_RDONLY)
        self.size = config["size"]
        for name, path in config["disks"].items():
            self.disks[name] = open_disk(path, readonly=name == "root")
        self.run()
        self.state = "Paused"


class Firecracker(Vm):
    told = False
    """The guest will hear of a reset of its vsock when it goes on, because it was saved; else it hears nothing."""

    def handle(self, method: str, target: str, body: dict) -> object:  # type: ignore[type-arg]
        kind = re.sub(r"(?<=^/drives/)\w+|(?<=^/network-interfaces/)\w+", "ID", target)
        match method, kind:
            case "GET", "/":
                state = {"none": "Not started"}.get(self.state, self.state)
                return {"app_name": "Firecracker", "id": "x", "state": state, "vmm_version": "1.16.1"}
            case "GET", "/hotplug/memory":
                return {"plugged_size_mib": self.plugged >> 20, "requested_size_mib": self.plugged >> 20}
            case "PATCH", "/hotplug/memory":
                self.plugged = body["requested_size_mib"] << 20
            case "PATCH", "/balloon":
                self.want("Running", "Paused")
                self.lent = body["amount_mib"] << 20
            case "PATCH", "/vm":
                self.want("Running", "Paused")
                self.state = "Running" if body["state"] == "Resumed" else "Paused"
                self.deaf = not self.told
                self.told = False
            case "PUT", "/machine-config":
                self.size = body["mem_size_mib"] << 20
            case "PUT", "/boot-source":
                os.close(os.open(body["kernel_image_path"], os.O_RDONLY))
            case "PUT", "/drives/ID":
                self.want("none")
                name = body["drive_id"]
                self.disks[name] = open_disk(body["path_on_host"], readonly=body["is_read_only"])
            case "PATCH", "/drives/ID":
                self.want("Running", "Paused")
                self.disks[body["drive_id"]] = open_disk(body["path_on_host"], readonly=False)
            case "PUT", "/vsock" | "/entropy" | "/balloon" | "/hotplug/memory" | "/network-interfaces/ID":
                self.want("none")
            case "PUT", "/actions":
                self.run()
            case "PUT", "/snapshot/create":
                self.want("Paused")
                self.told = True
                saved = {**self.memory, "size": self.size, "plugged": self.plugged, "disks": list(self.disks)}
                Path(body["snapshot_path"]).write_text(json.dumps(saved))
                Path(body["mem_file_path"]).write_bytes(b"\0" * 4096)
            case "PUT", "/snapshot/load":
                self.want("none")
                self.memory = json.loads(Path(body["snapshot_path"]).read_text())
                os.open(body["mem_backend"]["backend_path"], os.O_RDONLY)
                self.size, self.plugged = self.memory.pop("size"), self.memory.pop("plugged")  # type: ignore[assignment]
                for name in self.memory.pop("disks"):  # type: ignore[attr-defined]
                    self.disks[name] = open_disk(f"disk-{name}", readonly=name == "root")
                self.run()
                self.state = "Paused"
                self.told = True
            case _:
                raise Refused(f"no such request: {method} {target}")
        return None


def serve(vm: CloudHypervisor | Firecracker, listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            data, ancillary, _, _ = connection.recvmsg(65536, 1024)
            head, _, body = data.partition(b"\r\n\r\n")
            if not head:
                continue
            length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])  # type: ignore[index]
            while len(body) < length:
                body += connection.recv(65536)
            fds = array.array("i")
            for _, _, payload in ancillary:
                fds.frombytes(payload)
            method, target, _ = head.split(b"\r\n")[0].decode().split()
            CloudHypervisor.fds = list(fds)
            with open("requests", "a") as log:
                log.write(json.dumps([method, target, json.loads(body or b"null"), len(fds)]) + "\n")
            try:
                answer, status = vm.handle(method, target, json.loads(body or b"{}")), "200 OK"
            except (Refused, OSError, KeyError) as error:
                answer, status = (
                    ["Error from API", str(error)] if CLOUD_HYPERVISOR else {"fault_message": str(error)},
                    "500 Internal Server Error" if CLOUD_HYPERVISOR else "400 Bad Request",
                )
            encoded = b"" if answer is None else json.dumps(answer).encode()
            header = f"HTTP/1.1 {status}\r\nContent-Length: {len(encoded)}\r\n\r\n"
            if answer is None:
                header = "HTTP/1.1 204 \r\nServer: fake\r\nConnection: keep-alive\r\n\r\n"
            with contextlib.suppress(OSError):  # the client has hung up
                connection.sendall(header.encode() + encoded)


def run_jailed() -> None:
    end = sys.argv.index("--")
    arguments = dict(zip(sys.argv[1:end:2], sys.argv[2:end:2], strict=True))
    program, name = os.path.realpath(arguments["--exec-file"]), arguments["--id"]
    root = Path(arguments["--chroot-base-dir"], os.path.basename(program), name, "root")
    uid, gid = int(arguments["--uid"]), int(arguments["--gid"])
    os.closerange(3, 1 << 16)
    root.chmod(0o700)
    os.chown(root, uid, gid)
    os.chdir(root)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    os.execve(program, [program, "--id", name, *sys.argv[end + 1 :]], {})


def main() -> None:
    if "jailer" in Path(sys.argv[0]).name:
        print("Jailer v1.16.1\n") if "--version" in sys.argv else run_jailed()
        return
    arguments = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=False))
    if "--version" in sys.argv:
        print("cloud-hypervisor v53.0" if CLOUD_HYPERVISOR else "Firecracker v1.16.1\n\nSupported snapshots: v9")
    elif CLOUD_HYPERVISOR:
        vm = CloudHypervisor()
        vm.events = int(arguments["--event-monitor"].removeprefix("fd="))
        serve(vm, socket.socket(fileno=int(arguments["--api-socket"].removeprefix("fd="))))
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(arguments["--api-sock"])
            listener.listen()
            serve(Firecracker(), listener)


main()
