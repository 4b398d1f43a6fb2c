"""What is in the bundle and under which terms: licence texts, and a list of contents (CycloneDX 1.5).

Nothing is guessed from requirement files: PyInstaller's own tables say which file went in from where, and
each is traced to the Python distribution or the Debian package that owns it. A file nobody owns, or an
owner without a licence text, fails the build.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
COMMON = Path("/usr/share/common-licenses")
"""Texts that Debian's packages name instead of having them; other distributions do not have them either."""
CHANGES = {
    "libc6": """\
packaging/appliance/bring_c_library.py has replaced names of the host's directories and files: in the loader,
ld-linux-*, those of libraries and of /etc/ld.so.preload, in libc.so.6 those of gconv. All else is as in Debian's
package, whose source is Debian's glibc of this version.
"""
}
"""Package → what was changed in its files, as the LGPL wants it said."""


class Component(NamedTuple):
    name: str
    version: str
    purl: str
    licence: str
    texts: tuple[Path, ...]
    """Files with the terms in full."""


def bundled_files(tables: Path) -> Iterator[Path]:
    """Sources of everything in the bundle: Python modules, libraries, data. ``tables`` is PyInstaller's workpath."""
    for name in ("PYZ-00.toc", "COLLECT-00.toc"):
        for entry in _entries(ast.literal_eval((tables / name).read_text())):
            yield Path(entry)


def listed_files(names: Path) -> list[Path]:
    """What ``bring_c_library.py`` copied: PyInstaller's tables do not have it."""
    return [Path(line) for line in names.read_text().splitlines()]


def _entries(tree: object) -> Iterator[str]:
    """The source path of each (name, source, kind) triple, at whatever depth."""
    if isinstance(tree, tuple) and len(tree) == 3 and all(isinstance(part, str) for part in tree):
        if tree[1].startswith("/") and tree[2] != "SYMLINK":
            yield tree[1]
    elif isinstance(tree, list | tuple):
        for branch in tree:
            yield from _entries(branch)


def python_owners() -> dict[Path, metadata.Distribution]:
    """File → the distribution that installed it."""
    return {
        Path(str(distribution.locate_file(file))).resolve(): distribution
        for distribution in metadata.distributions()
        for file in distribution.files or ()
    }


def python_component(distribution: metadata.Distribution) -> Component:
    about = distribution.metadata
    name = about["Name"].lower().replace("_", "-")
    licence = about.get("License-Expression") or _classifier(about) or (about.get("License") or "").split("\n")[0]
    texts = tuple(
        Path(str(distribution.locate_file(file)))
        for file in distribution.files or ()
        if ".dist-info" in file.parts[0] and file.name.upper().startswith(("LICEN", "COPYING", "NOTICE"))
    )
    return Component(name, distribution.version, f"pkg:pypi/{name}@{distribution.version}", licence or "unknown", texts)


def _classifier(about: metadata.PackageMetadata) -> str:
    names = [line.rsplit(" :: ", 1)[1] for line in about.get_all("Classifier") or () if line.startswith("License ::")]
    return " OR ".join(names)


def debian_component(file: Path) -> Component | None:
    """The Debian package that ``file`` belongs to. Merged /usr: the database may know it without /usr."""
    for candidate in {file, Path("/" + str(file).removeprefix("/usr/"))}:
        found = subprocess.run(["dpkg", "-S", str(candidate)], capture_output=True, text=True, check=False)
        if found.returncode == 0:
            return debian_package(found.stdout.split(":")[0])
    return None


def debian_package(package: str) -> Component:
    version = _output("dpkg-query", "-W", "-f", "${Version}", package)
    return Component(
        package,
        version,
        f"pkg:deb/debian/{package}@{version}",
        "see text",
        (Path(f"/usr/share/doc/{package}/copyright"),),
    )


def ui_components(folder: Path) -> list[Component]:
    """The npm packages in the web UI, as its build listed them."""
    found = []
    for package in json.loads((folder / "dist" / "packages.json").read_text()):
        name, version = package["name"], package["version"]
        texts = tuple(sorted((folder / "node_modules" / name).glob("LICEN[CS]E*")))
        purl = f"pkg:npm/{name.replace('@', '%40')}@{version}"
        found.append(Component(name.replace("/", "-").lstrip("@"), version, purl, package["license"], texts))
    return found


def find_components(files: set[Path], kernel: Path) -> list[Component]:
    owners = python_owners()
    found: dict[str, Component] = {}
    unowned = []
    for file in {path.resolve() for path in files}:
        if file.is_relative_to(ROOT) and "site-packages" not in file.parts:
            continue  # ours, or made here; the kernel is listed below
        component = python_component(owners[file]) if file in owners else debian_component(file)
        if component is None:
            unowned.append(str(file))
        else:
            found[component.purl] = component
    if unowned:
        raise SystemExit("contents: nobody owns these files of the bundle:\n" + "\n".join(sorted(unowned)))
    # PyInstaller's bootloader and what starts it; musl is in the static programs.
    for extra in (python_component(metadata.distribution("pyinstaller")), debian_package("musl")):
        found[extra.purl] = extra
    for component in ui_components(ROOT / "build" / "ui"):
        found[component.purl] = component
    version = kernel.name.split("-", 1)[1].rsplit("-", 1)[0]  # kernel-<source version>-<hash>
    source = Component(
        "linux",
        version,
        f"pkg:deb/debian/linux@{version}?arch=source",
        "GPL-2.0-only",
        (Path("/usr/share/common-licenses/GPL-2"),),
    )
    found[source.purl] = source
    return sorted(found.values())


def write_licences(components: list[Component], folder: Path) -> None:
    for component in components:
        texts = [path for path in component.texts if path.is_file()]
        if not texts:
            raise SystemExit(f"contents: no licence text for {component.name} {component.version}")
        target = folder / f"{component.name}-{component.version.replace(':', '_')}"
        target.mkdir(parents=True, exist_ok=True)
        for text in texts:
            (target / text.name).write_bytes(text.read_bytes())
            for name in re.findall(rf"{COMMON}/([A-Za-z][A-Za-z0-9.-]*[A-Za-z0-9])", text.read_text(errors="replace")):
                if (COMMON / name).is_file():
                    (folder / COMMON.name).mkdir(exist_ok=True)
                    (folder / COMMON.name / name).write_bytes((COMMON / name).read_bytes())
        if component.name in CHANGES:
            (target / "CHANGES").write_text(CHANGES[component.name])


def render_sbom(components: list[Component], bundle: Path, version: str, timestamp: int) -> str:
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "timestamp": datetime.datetime.fromtimestamp(timestamp, datetime.UTC).isoformat(),
            "component": {"type": "application", "name": "hypeman", "version": version},
        },
        "components": [
            {
                "type": "operating-system" if component.name == "linux" else "library",
                "name": component.name,
                "version": component.version,
                "purl": component.purl,
                "licenses": [{"license": {"name": component.licence}}],
            }
            for component in components
        ]
        + [
            {
                "type": "file",
                "name": str(path.relative_to(bundle)),
                "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(path.read_bytes()).hexdigest()}],
            }
            for path in sorted(bundle.rglob("*"))
            if path.is_file() and not path.is_symlink()
        ],
    }
    return json.dumps(document, indent=1) + "\n"


def _output(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--bundle", "--tables", "--c-library", "--kernel", "--licences", "--sbom"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--version", required=True)
    arguments = parser.parse_args()
    files = {*bundled_files(arguments.tables), *listed_files(arguments.c_library)}
    components = find_components(files, arguments.kernel)
    timestamp = int(os.environ["SOURCE_DATE_EPOCH"])
    arguments.sbom.write_text(render_sbom(components, arguments.bundle, arguments.version, timestamp))
    write_licences(components, arguments.licences)
    print(f"  {len(components)} components", file=sys.stderr)


if __name__ == "__main__":
    main()
