"""Documents are true of the code: files, links, targets, commands and tests that they name exist.

Read are all Markdown files, the docstrings at the head of Python modules, and the comments at the head of C files.
"""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import click
import pytest

from hypeman.cli.main import hypeman

ROOT = Path(__file__).parents[1]
SKIPPED = frozenset([".venv", ".git", "build", "dist", ".mypy_cache", ".ruff_cache"])
SHORT_FOR = ("hypeman", "tests", "ext", "packaging", "systemd")
"""Folders whose name a path may leave out."""


def sources(*suffixes: str) -> list[Path]:
    return sorted(
        path
        for path in ROOT.rglob("*")
        if path.suffix in suffixes and not SKIPPED & set(path.relative_to(ROOT).parts[:-1])
    )


MARKDOWN = sources(".md")
ALL = MARKDOWN + sources(".py", ".c", ".h", ".pyx")
NAMES = {path.name for path in ROOT.rglob("*") if not SKIPPED & set(path.relative_to(ROOT).parts[:-1])}


def text_of(path: Path) -> str:
    """What the file says about the code: all of a document, the head of a source."""
    text = path.read_text()
    match path.suffix:
        case ".py":
            return ast.get_docstring(ast.parse(text)) or ""
        case ".c" | ".h":
            head = re.match(r"\s*/\*(.*?)\*/", text, re.DOTALL)
            return head[1] if head else ""
        case ".pyx":
            head = re.match(r'.*?"""(.*?)"""', text, re.DOTALL)
            return head[1] if head else ""
    return text


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def is_there(name: str, near: Path) -> bool:
    """Whether a file is meant by ``name``: from the root, from the document, or below a well-known folder."""
    if "/" not in name:
        return name in NAMES
    folders = [ROOT, near, *near.parents, *(ROOT / folder for folder in SHORT_FOR)]
    return any((folder / name).exists() for folder in folders)


FILE_NAME = re.compile(r"(?<![\w/.<>*{}$~-])((?:[\w.-]+/)*[\w-]+\.(?:py|pyx|c|md|sh|toml))(?![\w/*])")
FOREIGN = ("include/", "fs/", "~/")
"""Where paths of the kernel's own sources begin."""


@pytest.mark.parametrize("path", ALL, ids=relative)
def test_files_that_are_named_exist(path: Path) -> None:
    missing = {
        name
        for name in FILE_NAME.findall(text_of(path))
        if not name.startswith((*FOREIGN, "./")) and not is_there(name, path.parent)
    }
    assert not missing


@pytest.mark.parametrize("path", MARKDOWN, ids=relative)
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", path.read_text())
    assert not [target for target in targets if not (path.parent / target).exists()]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def code_of(text: str) -> str:
    """What stands in backquotes, in fences or is indented as code: the parts that a reader types."""
    fences = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = re.findall(r"^ {4}(\S.*)$", rest, re.MULTILINE)
    return "\n".join([*fences, *lines, *re.findall(r"`([^`\n]+)`", rest)])


@pytest.mark.parametrize("path", MARKDOWN, ids=relative)
def test_make_targets_exist(path: Path) -> None:
    named = re.findall(r"(?:^|&& |\s{2,})make ([a-z][a-z0-9-]+)\b(?!/)", code_of(path.read_text()), re.MULTILINE)
    assert not set(named) - make_targets()


@pytest.mark.parametrize("path", MARKDOWN, ids=relative)
def test_commands_exist(path: Path) -> None:
    """``hypeman VERB [VERB]`` at the beginning of a line of code."""
    for line in code_of(path.read_text()).splitlines():
        words = line.split()
        if not words or words[0] != "hypeman" or len(words) < 2 or not re.fullmatch(r"[a-z][a-z-]*", words[1]):
            continue
        command: click.Command = hypeman
        for word in words[1:]:
            if not isinstance(command, click.Group) or "/" in word or word.startswith("-"):
                # `push IMAGE` and `build -t NAME` are groups with a default
                break
            found = command.get_command(click.Context(command), word)
            assert found is not None, f"{line!r}: there is no {word!r}"
            command = found


@pytest.mark.parametrize("path", MARKDOWN, ids=relative)
def test_options_exist(path: Path) -> None:
    """Options of ``hypeman VERB …`` at the beginning of a line of code, up to ``--``, a pipe or a comment."""
    for line in code_of(path.read_text()).splitlines():
        words = re.split(r"\s(?:--|[|#&;<>].*)(?:\s|$)", line)[0].split()
        if words[:1] != ["hypeman"]:
            continue
        command: click.Command = hypeman
        options = options_of(command)
        for word in words[1:]:
            if isinstance(command, click.Group) and (found := command.get_command(click.Context(command), word)):
                command = found
                options |= options_of(command)
                if isinstance(command, click.Group):  # one with a default, as `build .` and `push IMAGE`
                    options |= {option for each in command.commands.values() for option in options_of(each)}
            elif re.fullmatch(r"--[a-z-]+(=.*)?|-[A-Za-z]", name := word.strip("[]")):
                assert name.split("=")[0] in options, f"{line!r}: there is no {name!r}"


def options_of(command: click.Command) -> set[str]:
    return {"--help", *(option for param in command.params for option in (*param.opts, *param.secondary_opts))}


def test_every_target_is_described() -> None:
    listed = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    public = set(phony[1].split()) - {"ready", "ready-own"}
    assert set(re.findall(r"^  make (\S+)", listed.stdout, re.MULTILINE)) == public


def test_security_promises_are_enforced_by_tests_that_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 20
    missing = [
        f"{file}::{test}" for file, test in named if not re.search(rf"def {test}\b", _text_or_nothing(ROOT / file))
    ]
    assert not missing


def _text_or_nothing(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_the_changelog_names_the_version() -> None:
    from hypeman import __version__

    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert __version__ in versions
