"""The commands on embeddings as a user runs them: printed tables, files, pages and errors."""

import json
import os

import pytest
from expect import user_error

from embeddings import save_small_encoder
from localagg import cli
from localagg.cli.commands import COMMANDS
from localagg.cli.embeddings.pictures import check_page
from localagg.embeddings.tables.write_table import write_embeddings


@pytest.fixture(scope="module")
def table(pictures, tmp_path_factory):
    work = tmp_path_factory.mktemp("table")
    weights, _ = save_small_encoder(work / "small.safetensors")
    write_embeddings(weights, pictures, work / "e.parquet", split="train")
    return work / "e.parquet"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("clusters {table} --k 3 --out {out}", "3 clusters"),
        ("duplicates {table} --above 0.99 --out {out}", "48 images"),
        ("outliers {table} --top 4 --out {out}", "4 of 48 images"),
        ("search {table} {picture} --k 3", "48 rows"),
        ("compare {table} {table} --top 3 --out {out}", "100%"),
    ],
)
def test_a_command_prints_a_table_and_writes_files(
    words, shown, table, pictures, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    picture, out = pictures / "train" / "flower" / "01.jpg", tmp_path / "o.csv"
    filled = words.format(table=table, picture=picture, out=out).split()
    page, result = tmp_path / "p.html", tmp_path / "r.json"
    assert cli.main([*filled, "--html", str(page), "--json", str(result)]) == 0
    printed = capsys.readouterr().out
    assert shown in printed
    assert max(len(line) for line in printed.splitlines() if str(tmp_path) not in line) <= 80
    assert json.loads(result.read_text())
    assert "webp" in page.read_text()
    assert ("--out" in filled) == out.exists()


def test_files_are_checked_before_the_work(table, tmp_path):
    with user_error("option-invalid", "p.txt"):
        check_page(str(tmp_path / "p.txt"))
    with user_error("not-found", "none"):
        check_page(os.path.join(tmp_path, "none", "p.html"))
    for name in ("clusters", "duplicates", "outliers"):
        kind, run = COMMANDS[name]
        with user_error("option-invalid", "--out", ".csv"):
            run(kind(str(tmp_path / "none"), out="o.xlsx"))
        with user_error("option-invalid", "--html"):
            run(kind(str(tmp_path / "none"), html="p.png"))
    kind, run = COMMANDS["clusters"]
    with user_error("option-invalid", "--k", "many"):
        run(kind(str(table), k="many"))
