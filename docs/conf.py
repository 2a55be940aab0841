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
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "localagg"
html_show_copyright = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # tests/test_notebooks.py executes them
autodoc_member_order = "bysource"


DOCS = Path(__file__).parent


COPIES = {"benchmarks/results": "measurements", "notebooks": "notebooks"}
"""Folders of the project that pages link to, and their names in the site."""


def copy_folders(_app: object) -> None:
    for folder, name in COPIES.items():
        shutil.rmtree(DOCS / name, ignore_errors=True)
        ignore = shutil.ignore_patterns("runs", "clothing-*", ".ipynb_checkpoints")
        shutil.copytree(DOCS.parent / folder, DOCS / name, ignore=ignore)


def link_copies(_app: object, _page: str, source: list[str]) -> None:
    for folder, name in COPIES.items():
        source[0] = source[0].replace(f"](../{folder}/", f"]({name}/")
    source[0] = source[0].replace("](../docs/", "](../")  # in notebooks


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
    app.connect("builder-inited", copy_folders)
    app.connect("builder-inited", write_commands)
    app.connect("source-read", link_copies)
