"""Examples in the documentation run, and what it names exists."""

import dataclasses
import doctest
import re
from pathlib import Path

import pytest

from localagg import config, objectives
from localagg.cli.commands import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_examples_run(page):
    failed, _ = doctest.testfile(str(page), module_relative=False)
    assert failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_commands_and_options_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for result in re.findall(r"benchmarks/[\w./-]+\w", text):
        assert (ROOT / result).exists(), result
    for command in re.findall(r"`localagg ([\w-]+)", text):
        assert command in COMMANDS
    for function in re.findall(r"`objectives\.(\w+)`", text):
        assert hasattr(objectives, function)
    kinds = [kind for kind, _ in COMMANDS.values()]
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    names |= {*config.option_names(config.PretrainConfig())}
    names |= {*config.option_names(config.TransferConfig())}
    options = {config.flag(name) for name in names} | {"--help", "--json", "--version", "--gpu"}
    for option in re.findall(r"`(--[a-z-]+)(?![\w-])", text):
        assert option in options, option
