"""Outputs that would replace what a command reads or a run needs; values that cannot be meant."""

import os

import pytest
from altered_images import texture
from expect import user_error
from small_commands import run_and_table

import localagg
from localagg import cli
from localagg.data.loading.workers import map_in_workers


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    run_and_table(folder)
    (folder / "photo.png").write_bytes(b"a photo")
    (folder / "textures").mkdir()
    for seed in range(24):
        texture(seed).save(folder / "textures" / f"{seed}.png")
    own = ["--data", str(folder / "textures"), "--out", str(folder / "textures.parquet")]
    assert cli.main(["embed", str(folder / "run"), *own]) == 0
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to(folder / "loop")
    return folder


@pytest.mark.parametrize(
    "command",
    [
        "clusters table.parquet --out table.parquet",
        "clusters table.parquet --json table.parquet",
        "clusters run --json run/config.json",
        "knn run --json run/results.json",
        "outliers table.parquet --json fifo",
        "inspect photos --json photos/x.json",
        "transfer run --data photos --quick --out photos/t",
        "clusters table.parquet --out x.json --json x.json",
        "import-tf nothing --model resnet18 --out w.safetensors --bank w.safetensors",
        "report textures.parquet --out textures/x.html",
        "clusters textures.parquet --k 2 --html textures/x.html",
        "clusters textures.parquet --k 2 --json textures/x.json",
        "inspect textures --image-column left",
        "embed run --data textures --image-column left --out x.parquet",
        "pretrain digits --data digits --image-column left --out x",
        "pretrain adapt --data textures --model resnet18 --weights run --cache textures/c --out y",
        "report run --out photo.png",
        "report run --out fifo.html --json fifo",
        "knn run --json -",
        "clusters table.parquet --html -",
        "knn run --json results/",
        "embed fifo --data digits --out x.parquet",
        "embed run/config.json --data digits --out x.parquet",
        "embed photo.png --data digits --out x.parquet",
        "transfer run --data digits --heads fifo",
        "pretrain digits --data photos --out loop/x",
        "pretrain digits --data digits --out x --processes 99999",
        "pretrain digits --data digits --out x --dim 100000000000000",
        "pack photos y --like reference --seed -1",
        "pack photos z --like reference --seed 4294967296",
        "inspect photos --workers 100000",
        "search table.parquet ''",
        "search table.parquet 0 --run run",
        "embed run --data digits --out q.parquet --layer",
        "transfer run --data digits --few",
        "pretrain digits --data digits --out ''",
        "pretrain '' --data digits --out x",
        "clusters table.parquet --json ''",
        "inspect photos --split ''",
    ],
)
def test_a_mistake_is_refused_and_changes_no_file(command, made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    if not (made / "photos").exists():
        (made / "photos").mkdir()
        (made / "photos" / "a.png").write_bytes(b"nothing")
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*") if not path.is_symlink()}
    words = ["" if word == "''" else word for word in command.split()]
    assert cli.main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("localagg: ")
    found = {path: path.stat().st_mtime_ns for path in made.rglob("*") if not path.is_symlink()}
    changed = {path for path in before if found.get(path) != before[path] and path.is_file()}
    assert not changed


def test_python_refuses_the_same(made):
    for function in (localagg.load, localagg.resume, localagg.write_report):
        with user_error("option-invalid"):
            function("")
    with user_error("option-invalid", ".html"):
        localagg.write_report(made / "run", made / "run" / "config.json")
    with user_error("option-conflict", "--out"):
        localagg.write_report(made / "textures.parquet", made / "textures" / "x.html")
    with user_error("not-found"):
        localagg.load(made / "fifo")


def test_no_more_workers_start_than_there_is_work():
    assert list(map_in_workers(abs, [-1], 16)) == [1]
    with user_error("too-large", 1000):
        next(map_in_workers(abs, [-1] * 2000, 1000))
