"""The layout of the data directory and the runtime directory, as pure functions.

data_dir/                       survives reboots; 0711
  store/                        LMDB: the authoritative records
  images/<digest>/              root disk and config of one image, published by rename
  templates/                    formatted overlays, copied for each instance
  captures/<id>/                memory and disks of instances in standby
  blobs/sha256/<hex>            compressed layers kept for the next pull, bounded
  volumes/<id>/disk.raw         disks that outlive instances
  instances/<id>/               overlay, boot disk, logs of one instance
  snapshots/<id>/               disks of snapshots
  builds/<id>/                  context and journal of one build
  egress/                       certificate authority, sealed secrets
  ingress/                      certificate authority for hosts without a public name
  tmp/                          incomplete files; emptied at start
run_dir/                        cleared by a reboot (tmpfs); 0755 so that VMM users can search it
  hypeman.sock                  the API
  engine/                       sockets of engines, for the next server; 0700
  vm/<id>/                      sockets and pid files of one VMM, owned by its user
"""

from __future__ import annotations

from pathlib import Path

import msgspec


class Paths(msgspec.Struct, frozen=True):
    """All paths of one server; ``data_dir`` and ``run_dir`` are absolute."""

    data_dir: Path
    run_dir: Path

    @property
    def store(self) -> Path:
        return self.data_dir / "store"

    @property
    def tmp(self) -> Path:
        return self.data_dir / "tmp"

    @property
    def images(self) -> Path:
        return self.data_dir / "images"

    @property
    def blobs(self) -> Path:
        return self.data_dir / "blobs"

    @property
    def volumes(self) -> Path:
        return self.data_dir / "volumes"

    @property
    def instances(self) -> Path:
        return self.data_dir / "instances"

    @property
    def captures(self) -> Path:
        return self.data_dir / "captures"

    @property
    def templates(self) -> Path:
        return self.data_dir / "templates"

    @property
    def snapshots(self) -> Path:
        return self.data_dir / "snapshots"

    @property
    def builds(self) -> Path:
        return self.data_dir / "builds"

    @property
    def egress(self) -> Path:
        return self.data_dir / "egress"

    @property
    def ingress(self) -> Path:
        return self.data_dir / "ingress"

    @property
    def api_socket(self) -> Path:
        return self.run_dir / "hypeman.sock"

    @property
    def vms(self) -> Path:
        return self.run_dir / "vm"

    @property
    def engines(self) -> Path:
        return self.run_dir / "engine"

    def instance(self, instance_id: str) -> InstancePaths:
        return InstancePaths(self.instances / instance_id, self.vms / instance_id)

    def volume_disk(self, volume_id: str) -> Path:
        return self.volumes / volume_id / "disk.raw"

    def capture(self, capture_id: str) -> Path:
        return self.captures / capture_id

    def build(self, build_id: str) -> Path:
        return self.builds / build_id

    def snapshot(self, snapshot_id: str) -> Path:
        return self.snapshots / snapshot_id


class InstancePaths(msgspec.Struct, frozen=True):
    """What one instance has on disk (``root``) and in the runtime directory (``run``)."""

    root: Path
    run: Path

    @property
    def overlay(self) -> Path:
        return self.root / "overlay.raw"

    @property
    def boot_disk(self) -> Path:
        return self.root / "boot.raw"

    @property
    def jail(self) -> Path:
        """The chroot of a VMM that has a jailer."""
        return self.root / "jail"

    @property
    def staged(self) -> Path:
        """Disks that are about to replace the instance's own."""
        return self.root / "staged"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def log(self, source: str) -> Path:
        """``source`` is ``app`` (serial console), ``vmm`` or ``hypeman``."""
        return self.logs / f"{source}.log"

    def volume_overlay(self, volume_id: str) -> Path:
        return self.root / f"volume-{volume_id}.raw"
