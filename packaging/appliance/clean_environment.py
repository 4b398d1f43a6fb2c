"""First thing in the bundle: take the bootloader's variables out of our environment.

It sets LD_LIBRARY_PATH for itself and keeps what was there before. By now our own libraries are found without
it, and QEMU, nft or mkfs would find ours in place of the system's.
"""

import os

before = os.environ.pop("LD_LIBRARY_PATH_ORIG", None)
os.environ.pop("LD_LIBRARY_PATH", None)
if before is not None:
    os.environ["LD_LIBRARY_PATH"] = before
for name in [name for name in os.environ if name.startswith("_PYI_")]:
    del os.environ[name]
