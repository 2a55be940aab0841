import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from expect import user_error
from small_runs import QUICK

import localagg
from embeddings import blobs, save_small_encoder, save_table
from localagg import pretrain
from localagg.cli.main import main
from localagg.config import override
from localagg.embeddings.tables.write_table import write_embeddings
from localagg.report import run_report
from localagg.report.run_report import write_report


def page_data(path):
    text = path.read_text()
    return json.loads(re.search("id=data>(.*?)</script>", text)[1]), text


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    config = override(QUICK, epochs=2, batch_size=16, image_size=24, neighbors=8, clusters=(4,))
    pretrain(config, str(pictures), folder)
    return folder


def test_the_page_of_a_run_has_all_parts(run):
    found = write_report([run])
    assert found["out"] == str(run / "report.html")
    assert found["images"] == found["pictures"] == 48
    data, text = page_data(run / "report.html")
    assert [section["title"] for section in data["sections"]] == [
        *("Clusters", "Near-duplicates", "Oddest")
    ]
    names = {column["name"]: column.get("names") for column in data["columns"]}
    assert names["label"] == ["flower", "temple"]
    assert len(names["cluster"]) == found["clusters"]
    assert "class=verdict" in text
    assert "trained network" in text
    assert "How it learned" in text
    before = (run / "map.safetensors").stat().st_mtime_ns
    localagg.write_report(str(run))
    assert (run / "map.safetensors").stat().st_mtime_ns == before
    assert page_data(run / "report.html")[0] == data


def test_clusters_name_their_size_and_most_common_label(tmp_path):
    rows = blobs([30, 20])
    labels = ["cat"] * 30 + ["dog"] * 15 + ["cat"] * 5
    table = save_table(tmp_path / "t.parquet", rows, labels)
    data, _ = page_data(tmp_path / "t.html") if write_report([table]) else (None, None)
    assert sum(int(row["title"].split()[2]) for row in data["sections"][0]["rows"]) == 50
    paths = data["paths"]
    for row in data["sections"][0]["rows"]:
        own = {labels[int(paths[item].split(".")[0])] for item in row["items"]}
        assert len(own) == 2 or row["title"].endswith(f"100% {own.pop()}")
    assert "Without pictures" in data["map"]["note"]


def test_the_most_similar_pairs_and_the_oddest_come_first(tmp_path):
    rows = blobs([40], spread=0.5)
    rows[7] = rows[3]
    rows[11] = -rows.mean(axis=0) / np.linalg.norm(rows.mean(axis=0))
    write_report([save_table(tmp_path / "t.parquet", rows)])
    data, _ = page_data(tmp_path / "t.html")
    first = data["sections"][1]["rows"][0]
    assert {data["paths"][i] for i in first["items"]} == {"3.jpg", "7.jpg"}
    assert first["lines"][1] == ["1.000"]
    pairs = [tuple(sorted(row["items"])) for row in data["sections"][1]["rows"]]
    assert len(pairs) == len({*pairs})
    assert data["paths"][data["sections"][2]["rows"][0]["items"][0]] == "11.jpg"


def test_further_columns_of_a_table_color_the_map(tmp_path):
    path = save_table(tmp_path / "t.parquet", blobs([20, 20]))
    table = pq.read_table(path)
    columns = {"score": [i / 7 for i in range(40)], "camera": ["a", None] * 20, "one": ["x"] * 40}
    for name, values in columns.items():
        table = table.append_column(name, [values])
    pq.write_table(table, path)
    write_report([path], tmp_path / "other.html")
    found = {each["name"]: each for each in page_data(tmp_path / "other.html")[0]["columns"]}
    assert found["camera"]["names"] == ["a", "no camera"]
    assert 0 <= found["score"]["low"] < found["score"]["high"] <= 39 / 7
    assert "one" not in found


def test_of_large_tables_and_runs_a_sample_is_shown(run, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(run_report, "MOST", 20)
    found = write_report([run], tmp_path / "run.html")  # by its memory bank
    assert found["images"] == found["pictures"] == 20
    data, _ = page_data(tmp_path / "run.html")
    assert "20 of 48" in data["map"]["note"]
    assert "memory bank" in data["map"]["note"]
    assert "20 of 48" in capfd.readouterr().err
    table = save_table(tmp_path / "t.parquet", blobs([100]))
    assert write_report([table])["images"] == 20


def test_several_runs_are_compared(run, tmp_path):
    other = tmp_path / "<other>"
    other.symlink_to(run)
    write_report([run, other], tmp_path / "both.html")
    _, text = page_data(tmp_path / "both.html")
    assert text.count("class=verdict") == 2
    assert "&lt;other&gt;</bdi></li>" in text
    assert "<other>" not in text


def test_faults_are_reported_before_any_work(run, tmp_path):
    with user_error("option-missing"):
        write_report([])
    with user_error("not-found", tmp_path / "no"):
        write_report([tmp_path / "no"])
    with user_error("not-found", tmp_path):
        write_report([run], tmp_path)
    with user_error("not-found", "missing/x.html"):
        write_report([run], tmp_path / "missing" / "x.html")
    empty = tmp_path / "empty"
    empty.mkdir()
    with user_error("not-found", empty):
        write_report([empty])


def test_the_command_prints_where_the_page_is(pictures, tmp_path, capsys):
    weights, _ = save_small_encoder(tmp_path / "w.safetensors")
    table = tmp_path / "t.parquet"
    write_embeddings(weights, str(pictures), table)
    assert main(["report", str(table), "--json", str(tmp_path / "r.json")]) == 0
    assert str(tmp_path / "t.html") in capsys.readouterr().out
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["images"] == result["pictures"] == 60
    assert result["bytes"] == (tmp_path / "t.html").stat().st_size < 5_000_000
