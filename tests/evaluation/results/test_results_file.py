"""results.json: entries are kept in order, nothing is lost, damage is named and left alone."""

import json
import multiprocessing

import pytest
from expect import user_error
from small_results import ENTRY, entry

from localagg import __version__
from localagg.evaluation.results.results_file import append_result, read_results
from localagg.evaluation.results.results_table import compare


def test_results_are_kept_in_order_with_time_and_version(run):
    assert read_results(run) == []
    append_result(run, entry(step=7))
    append_result(run, entry(measure="linear", when="2020-01-01T00:00:00+00:00", version="0"))
    first, second = read_results(run)
    assert {**first, "when": 0} == {**entry(step=7), "when": 0, "version": __version__}
    assert first["when"].endswith("+00:00")
    assert (second["measure"], second["when"], second["version"]) == (
        *("linear", "2020-01-01T00:00:00+00:00", "0"),
    )
    assert list(json.loads((run / "results.json").read_text())) == ["results"]


def test_results_of_a_weights_file_stand_in_a_folder_beside(tmp_path):
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"")
    append_result(weights, ENTRY)
    assert (tmp_path / "w" / "results.json").exists()
    assert len(read_results(weights)) == 1
    with user_error("not-found", tmp_path / "no"):
        append_result(tmp_path / "no", ENTRY)
    with user_error("not-found", tmp_path / "no"):
        read_results(tmp_path / "no")


def _append_ten(run, who):
    for number in range(10):
        append_result(run, entry(values={"value": who * 10 + number}))


def test_processes_that_append_at_once_lose_nothing(run):
    forks = multiprocessing.get_context("fork")
    processes = [forks.Process(target=_append_ten, args=(run, who)) for who in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = [found["values"]["value"] for found in read_results(run)]
    assert sorted(found) == list(range(40))
    for who in range(4):  # and each one's are in its order
        own = [value for value in found if value // 10 == who]
        assert own == sorted(own)


def test_a_write_that_fails_leaves_the_file_as_it_was(run, monkeypatch):
    append_result(run, ENTRY)
    before = (run / "results.json").read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        append_result(run, ENTRY)
    assert (run / "results.json").read_bytes() == before


OTHER_FORMS = [
    json.dumps({"rows": [{"name": "IR", "knn1": 0.9}], "seconds": {}, "seed": 0}),  # demo
    json.dumps({"layers": {"1": {"top1": 0.5}}, "protocol": "linear"}),  # transfer
    json.dumps([1, 2]),
    json.dumps({"results": 3}),
]
DAMAGED = [
    '{"results": [',
    "",
    "\0\0\0",
    "[" * 100_000,
    json.dumps({"results": [4]}),
    *(
        json.dumps({"results": [entry(**change)]})
        for change in (
            {"measure": ""},
            {"protocol": {}},
            {"protocol": 3},
            {"values": {}},
            {"values": {"knn1": "0.5"}},
            {"values": {"knn1": float("nan")}},
            {"values": {"knn1": True}},
            {"images": "12"},
            {"intervals": {"knn1": "0.5"}},
            {"intervals": {"knn2": 0.5}},
            {"dataset": ["CIFAR-10"]},
            {"data": None},
        )
    ),
]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        *((content, "mismatch") for content in OTHER_FORMS),
        *((content, "damaged") for content in DAMAGED),
    ],
)
def test_other_and_damaged_files_are_named_and_left(run, content, code):
    (run / "results.json").write_text(content)
    for act in (lambda: append_result(run, ENTRY), lambda: compare([run])):
        with user_error(code, run / "results.json"):
            act()
    assert (run / "results.json").read_text() == content


def test_bytes_that_are_not_text_are_damage(run):
    (run / "results.json").write_bytes(b"\xff\xfe{}")
    with user_error("damaged"):
        read_results(run)


@pytest.mark.parametrize("values", [{}, {"a": float("inf")}, {"a": None}, {"a": False}])
def test_only_finite_numbers_are_written(run, values):
    with pytest.raises(ValueError, match="not a result"):
        append_result(run, entry(values=values))
    assert not (run / "results.json").exists()
