"""Names of foreign files on a terminal."""

import pickle

import pytest

from localagg.cli.main import main
from localagg.errors import Interrupted, UserError, printable
from localagg.io.console import notify, print_table

BAD = "a\nb\x1b[31m\udcff[red]c.jpg"
SHOWN = r"a\nb\x1b[31m\xff[red]c.jpg"


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
def test_what_a_terminal_would_obey_is_written_out(text, shown):
    assert printable(text) == (text if shown is None else shown)
    assert printable(printable(text)) == printable(text)
    printable(text).encode()  # surrogates could not be


def test_messages_and_tables_are_made_fit(capsys):
    notify(f"left out {BAD}")
    assert capsys.readouterr().err == f"left out {SHOWN}\n"
    print_table([BAD, ""], [[BAD, "1"]])
    assert capsys.readouterr().out.count(SHOWN) == 2
    assert str(UserError("TODO", f"'{BAD}' is bad.")) == f"'{SHOWN}' is bad."
    assert str(pickle.loads(pickle.dumps(UserError("TODO", BAD)))) == SHOWN
    assert str(Interrupted(BAD)) == SHOWN


def test_a_folder_of_ill_named_files_cannot_write_to_the_terminal(tmp_path, capsys):
    """Each way in which names come up: as unreadable, near-empty, duplicate, missing."""
    (tmp_path / "d").mkdir()
    for number in "12":
        (tmp_path / "d" / f"{number}\n\x1b[31m\udcff.jpg").write_bytes(b"x")
    data = str(tmp_path / "d")
    assert main(["inspect", data, "--recipe", "none"]) == 0
    said = capsys.readouterr()
    assert r"1\n\x1b[31m\xff.jpg" in said.out
    learn = [
        "pretrain",
        "digits",
        "--data",
        data,
        "--out",
        str(tmp_path / "r"),
        "--batch-size",
        "2",
    ]
    assert main(learn) == 2
    end = capsys.readouterr()
    assert r"1\n\x1b[31m\xff.jpg (" in end.err
    assert main(["inspect", f"{data}\n\x1b"]) == 2
    for text in (said.out, said.err, end.out, end.err, capsys.readouterr().err):
        assert "\x1b" not in text
