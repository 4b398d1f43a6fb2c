"""Builds what pyproject.toml cannot say: the compiled hot paths and the guest agent.

``python setup.py build_ext --inplace`` puts each extension beside its Python twin in
``hypeman/_native`` and the static programs, the guest agent and
the launcher of VMMs, into ``hypeman/guest/bin`` and ``hypeman/host/bin``. The extensions import
nothing of ours. The C that Cython writes goes to ``build/cython``.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
GUEST_AGENT = HERE / "hypeman" / "guest" / "bin" / "hypeman-init"
LAUNCHER = HERE / "hypeman" / "host" / "bin" / "hypeman-launch"

HARDENING = ["-O2", "-g", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fstack-protector-strong"]
REPRODUCIBLE = [f"-ffile-prefix-map={HERE.resolve()}=."]  # else the build's id tells the directory it was made in
LINKING = ["-Wl,-z,relro,-z,now", "-Wl,--as-needed"]

EGRESS_C = sorted((HERE / "ext" / "egress").glob("*.c"))

# module, Cython source, further C sources, libraries
EXTENSIONS = [
    ("hypeman._native._pciscan_c", "ext/pciscan.pyx", [], []),
    ("hypeman._native._tapstats_c", "ext/tapstats.pyx", [], []),
    ("hypeman._native._wsmask_c", "ext/wsmask.pyx", [], []),
    ("hypeman._native._egress_c", "ext/egress.pyx", EGRESS_C, ["ssl", "crypto", "nghttp2"]),
]


def extensions() -> list[Extension]:
    return [
        Extension(
            module,
            [source, *(str(path.relative_to(HERE)) for path in c_sources)],
            include_dirs=[str(c_sources[0].parent.relative_to(HERE))] if c_sources else [],
            depends=[str(path.relative_to(HERE)) for path in c_sources[:1] and c_sources[0].parent.glob("*.h")],
            libraries=libraries,
            extra_compile_args=[*HARDENING, *REPRODUCIBLE],
            extra_link_args=LINKING,
        )
        for module, source, c_sources, libraries in EXTENSIONS
        if (HERE / source).exists()
    ]


class BuildAll(build_ext):
    """The extensions, and the agent that goes into the guests."""

    def run(self) -> None:
        super().run()
        if (HERE / "ext" / "guest_agent" / "Makefile").exists():
            subprocess.run(["make", "-s", "-C", "ext/guest_agent", f"OUT={GUEST_AGENT}"], cwd=HERE, check=True)
        if (HERE / "ext" / "launcher" / "Makefile").exists():
            subprocess.run(["make", "-s", "-C", "ext/launcher", f"OUT={LAUNCHER}"], cwd=HERE, check=True)


setup(
    ext_modules=cythonize(
        extensions(),
        build_dir="build/cython",
        compiler_directives={"language_level": 3},
        show_all_warnings=True,
    ),
    cmdclass={"build_ext": BuildAll},
)
