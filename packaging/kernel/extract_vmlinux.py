"""``extract_vmlinux.py VMLINUZ OUTPUT``: the ELF kernel inside a bzImage.

The boot header (Documentation/x86/boot.rst) gives the position of the compressed kernel, whose first bytes identify the
compression.
"""

import gzip
import lzma
import struct
import subprocess
import sys
from pathlib import Path

LZ4_LEGACY = b"\x02!L\x18"
ZSTD = b"(\xb5/\xfd"
XZ = b"\xfd7zXZ\x00"
GZIP = b"\x1f\x8b"


def extract(image: bytes) -> bytes:
    if image[0x202:0x206] != b"HdrS":
        raise SystemExit("extract_vmlinux: not a bzImage")
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)  # payload_offset, payload_length
    begin = (setup_sectors + 1) * 512 + offset
    payload = image[begin : begin + length - 4]  # the last four bytes are the size when unpacked
    if payload.startswith(LZ4_LEGACY):
        kernel = subprocess.run(["lz4", "-dc"], input=payload, capture_output=True, check=True).stdout
    elif payload.startswith(ZSTD):
        kernel = subprocess.run(["zstd", "-dc"], input=payload, capture_output=True, check=True).stdout
    elif payload.startswith(XZ):
        kernel = lzma.LZMADecompressor().decompress(payload)
    elif payload.startswith(GZIP):
        kernel = gzip.decompress(payload)
    else:
        raise SystemExit(f"extract_vmlinux: unknown compression, first bytes {payload[:6].hex()}")
    if not kernel.startswith(b"\x7fELF"):
        raise SystemExit("extract_vmlinux: the result is not an ELF file")
    return kernel


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_bytes(extract(source.read_bytes()))
