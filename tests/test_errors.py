"""Errors: their codes, and names of foreign files on a terminal."""

import ast
import pickle
from pathlib import Path

import pytest

import localagg
from localagg.cli import main
from localagg.errors import CODES, Interrupted, UserError, first_line, printable, suggest
from localagg.io.console import notify, print_table

SRC = Path(localagg.__file__).parent
BAD = "a\nb\x1b[31m\udcff[red]c.jpg"
SHOWN = r"a\nb\x1b[31m\xff[red]c.jpg"


def raised_codes():
    """Yield (place, code) of each ``UserError(...)`` in the source that names its code."""
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError":
                code, place = node.args[0], f"{path.relative_to(SRC)}:{node.lineno}"
                if isinstance(code, ast.Starred) or "code" in ast.unparse(code):
                    continue
                for arm in (code.body, code.orelse) if isinstance(code, ast.IfExp) else (code,):
                    yield place, ast.literal_eval(arm)


def test_every_error_has_a_literal_code_and_every_code_is_used():
    found = list(raised_codes())
    assert [(place, code) for place, code in found if code not in CODES] == []
    assert set(CODES) == {code for _, code in found}


def test_suggest_names_a_close_word_or_nothing():
    assert "'digits'" in suggest("digitz", ["digits", "folder"])
    assert suggest("zzzz", ["digits"]) == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (BAD, SHOWN),
        ("\0\t\r\x7f\x9b", r"\x00\t\r\x7f\x9b"),
        ("\u202egpj.exe\u2028", r"\u202egpj.exe\u2028"),
        ("\ud800", r"\ud800"),
        ("C:\\ne\u00fc \u6587 \U0001f468\u200d\U0001f469.jpg", None),
    ],
)
def test_characters_that_a_terminal_interprets_are_escaped(text, shown):
    assert printable(text) == (text if shown is None else shown)
    assert printable(printable(text)) == printable(text)
    printable(text).encode()  # raises for surrogates


def test_messages_tables_and_errors_are_escaped(capsys):
    notify(f"skipped {BAD}")
    assert capsys.readouterr().err == f"skipped {SHOWN}\n"
    print_table([BAD, ""], [[BAD, "1"]])
    assert capsys.readouterr().out.count(SHOWN) == 2
    error = pickle.loads(pickle.dumps(UserError("damaged", BAD)))
    assert (error.code, str(error)) == ("damaged", SHOWN)
    assert str(Interrupted(BAD)) == SHOWN


def test_names_of_files_in_a_folder_cannot_control_the_terminal(tmp_path, capsys):
    data = tmp_path / "d"
    data.mkdir()
    for number in "12":
        (data / f"{number}\n\x1b[31m\udcff.jpg").write_bytes(b"x")
    assert main(["inspect", str(data), "--recipe", "none"]) == 0
    inspected = capsys.readouterr()
    assert r"1\n\x1b[31m\xff.jpg" in inspected.out
    words = ["pretrain", "digits", "--data", str(data), "--out", str(tmp_path / "r")]
    assert main([*words, "--batch-size", "2"]) == 2
    trained = capsys.readouterr()
    assert r"1\n\x1b[31m\xff.jpg" in trained.err
    assert main(["inspect", f"{data}\n\x1b"]) == 2
    for text in (*inspected, *trained, *capsys.readouterr()):
        assert "\x1b" not in text


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("one.\ntwo"), "one"),
        (RuntimeError(), "RuntimeError"),
        (OSError("\n"), "OSError"),
        (ValueError("x" * 1000), "x" * 200),
    ],
)
def test_the_first_line_of_an_error_is_never_empty_or_long(error, expected):
    assert first_line(error) == expected
