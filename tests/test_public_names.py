"""Public names, old import paths, and what importing the package costs."""

import os
import subprocess
import sys

import pytest

import localagg


def python(code: str, **environment: str) -> str:
    """Run code in a new process; return the last line that it prints."""
    names = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    words = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", code]
    return subprocess.check_output(words, text=True, env=inherited | environment).strip()


def test_every_public_name_exists():
    assert all(getattr(localagg, name) is not None for name in localagg.__all__)
    assert set(localagg.__all__) <= set(dir(localagg))
    with pytest.raises(AttributeError, match="'pretrian'"):
        localagg.pretrian  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        "import localagg",
        "import localagg.cli",
        "from localagg import RECIPES",
        "from localagg.data.sources.image_files import walk_images",
    ],
)
def test_torch_is_imported_only_when_it_is_needed(code):
    heavy = "[m for m in ('torch', 'faiss', 'datasets') if m in sys.modules]"
    assert python(f"import sys\n{code}\nprint({heavy})") == "[]"


def test_the_deprecated_module_pretrain_warns_and_returns_the_functions():
    with pytest.warns(DeprecationWarning, match=r"localagg\.resume"):
        from localagg.pretrain import resume  # pyright: ignore[reportMissingImports]
    assert resume is localagg.resume
    with pytest.raises(ImportError), pytest.warns(DeprecationWarning, match="pretrain"):
        from localagg.pretrain import pretrain, score  # noqa: F401


@pytest.mark.parametrize(
    "first", ["import localagg.pretrain", "from localagg.embeddings import embed"]
)
def test_public_functions_are_callable_whatever_was_imported_before(first):
    names = "embed, knn_accuracy, pretrain, transfer"
    code = f"{first}\nfrom localagg import {names}\nprint(all(map(callable, ({names}))))"
    assert python(code) == "True"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "30000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None")],
)
def test_threads_of_torch_spin_shortly_unless_the_environment_says_otherwise(given, expected):
    code = "import localagg, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert python(code, **given) == expected
