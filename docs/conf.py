"""Build the documentation site: make docs."""

import io
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path

from localagg import __version__, cli
from localagg.cli.commands import COMMANDS

project = "localagg"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "localagg"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"


DOCS = Path(__file__).parent


def copy_measurements(_app: object) -> None:
    """Copy the tables of benchmarks/results, which pages link to, into the site."""
    shutil.rmtree(DOCS / "measurements", ignore_errors=True)
    shutil.copytree(DOCS.parent / "benchmarks" / "results", DOCS / "measurements")


def link_copies(_app: object, _page: str, source: list[str]) -> None:
    source[0] = source[0].replace("](../benchmarks/results/", "](measurements/")


def write_commands(_app: object) -> None:
    """Write reference/commands.md from the help texts of all commands."""
    parts = ["# Commands", "This page is generated from the code: `localagg COMMAND --help`."]
    for command in COMMANDS:
        shown, sys.argv[0] = io.StringIO(), "localagg"
        with redirect_stdout(shown):
            try:
                cli.main([command, "--help"])
            except SystemExit as end:
                if end.code:
                    raise
        parts.append(f"## {command}\n\n```text\n{shown.getvalue().rstrip()}\n```")
    (DOCS / "reference" / "commands.md").write_text("\n\n".join(parts) + "\n")


def setup(app) -> None:
    app.connect("builder-inited", copy_measurements)
    app.connect("builder-inited", write_commands)
    app.connect("source-read", link_copies)
