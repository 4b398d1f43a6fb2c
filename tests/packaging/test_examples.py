"""The examples that people copy: what they set is what the configuration knows, and what they call exists."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
import yaml

from hypeman.cli.main import hypeman
from hypeman.config import load_config

EXAMPLES = Path(__file__).parents[2] / "packaging" / "examples"


def check_settings(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.d").mkdir()
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "config.d/50.yaml").write_text(text)
    load_config(tmp_path / "config.yaml", {})


def check_command(words: list[str]) -> None:
    """``hypeman bundle install …``, with options that exist."""
    command: click.Command = hypeman
    for word in words[1:]:
        if not isinstance(command, click.Group):
            break
        found = command.get_command(click.Context(command), word)
        assert found is not None, word
        command = found
    known = {text for option in command.params for text in option.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_cloud_init(tmp_path: Path) -> None:
    text = (EXAMPLES / "cloud-init.yaml").read_text()
    assert text.startswith("#cloud-config\n")
    tree = yaml.safe_load(text)
    for file in tree["write_files"]:
        assert file["permissions"] == "0600"
        check_settings(file["content"], tmp_path)
    for command in tree["runcmd"]:
        check_command(command)


def test_ansible() -> None:
    [play] = yaml.safe_load((EXAMPLES / "ansible.yaml").read_text())
    [command] = [task["ansible.builtin.command"] for task in play["tasks"] if "ansible.builtin.command" in task]
    check_command(command.split())


def test_small_host(tmp_path: Path) -> None:
    check_settings((EXAMPLES / "small-host.yaml").read_text(), tmp_path)


@pytest.mark.parametrize("name", ["cloud-init.yaml", "ansible.yaml"])
def test_they_are_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) <= 11
