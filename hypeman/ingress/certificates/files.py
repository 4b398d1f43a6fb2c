"""Certificates from files that other software keeps up to date. Blocking."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from hypeman.ingress.certificates.pem import MAX_PEM, BadCertificate, read_pair
from hypeman.ingress.certificates.types import Pair

_Seen = tuple[tuple[int, int, int], ...]


class CertificateFile:
    """One certificate with its key. If files change into something unusable, the last usable pair is kept."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self._paths = (certificate, key)
        self._seen: _Seen | None = None
        self.pair: Pair | None = None
        self.error = ""
        """What is wrong with the files as they are now."""

    def reload(self) -> bool:
        """Read the files if they have changed since; whether ``pair`` or ``error`` is another one now."""
        before = (self.pair, self.error)
        try:
            seen: _Seen = tuple(self._look(path) for path in self._paths)
            if seen == self._seen and not self.error:
                return False
            data = [self._read(path) for path in self._paths]
            self._seen = seen
            self.pair = read_pair(data[0], data[1])
            self.error = ""
        except OSError as error:
            self.error = f"{error.filename} cannot be read: {error.strerror}"
        except BadCertificate as error:
            self.error = f"{self._paths[0]} with {self._paths[1]} cannot be used: {error}"
        return before != (self.pair, self.error)

    @staticmethod
    def _look(path: Path) -> tuple[int, int, int]:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise BadCertificate(f"{path} is not a file")
        return found.st_mtime_ns, found.st_size, found.st_ino

    @staticmethod
    def _read(path: Path) -> bytes:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return file.read(MAX_PEM + 1)
