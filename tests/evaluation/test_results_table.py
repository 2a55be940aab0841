"""The table of results: what goes in comes out, unlike numbers keep apart, nothing is lost."""

import json
import multiprocessing
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localagg import __version__
from localagg.config import PretrainConfig, TransferConfig, ViewConfig, option_names, override
from localagg.errors import UserError
from localagg.evaluation.linear import protocol
from localagg.evaluation.published import DATASETS, PUBLISHED, dataset_name, knn_protocol
from localagg.evaluation.results_file import append_result, read_results
from localagg.evaluation.results_table import compare, tables
from localagg.models import create_encoder
from localagg.recipes.builtin import readout_recipe
from localagg.recipes.defaults import resolve_defaults

ENTRY = {
    "measure": "knn",
    "protocol": "held-out images ask the memory bank",
    "values": {"knn1": 0.25, "knn200": 0.5},
    "data": "pictures",
    "fingerprint": "aa",
    "images": 12,
}


def entry(**changes):
    return {**ENTRY, **changes}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


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
    for act in (
        lambda: append_result(tmp_path / "no", ENTRY),
        lambda: read_results(tmp_path / "no"),
    ):
        with pytest.raises(UserError, match="There is no run folder or weights file"):
            act()


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

    monkeypatch.setattr("localagg.checkpoint.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        append_result(run, ENTRY)
    assert (run / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"rows": [{"name": "IR", "knn1": 0.9}], "seconds": {}, "seed": 0}),  # demo
        json.dumps({"layers": {"1": {"top1": 0.5}}, "protocol": "linear"}),  # transfer
        json.dumps([1, 2]),
        json.dumps({"results": 3}),
    ],
)
def test_a_file_of_another_shape_is_never_touched(run, content):
    (run / "results.json").write_text(content)
    for act in (lambda: append_result(run, ENTRY), lambda: compare([run])):
        with pytest.raises(UserError, match="no list of measurements of a run"):
            act()
    assert (run / "results.json").read_text() == content


@pytest.mark.parametrize(
    "content",
    [
        '{"results": [',
        "",
        "\0\0\0",
        "[" * 100_000,
        json.dumps({"results": [4]}),
        json.dumps({"results": [entry(measure="")]}),
        json.dumps({"results": [entry(values={})]}),
        json.dumps({"results": [entry(values={"knn1": "0.5"})]}),
        json.dumps({"results": [entry(values={"knn1": float("nan")})]}),
        json.dumps({"results": [entry(values={"knn1": True})]}),
        json.dumps({"results": [entry(images="12")]}),
        json.dumps({"results": [entry(training_images="12")]}),
        json.dumps({"results": [entry(intervals={"knn1": "0.5"})]}),
        json.dumps({"results": [entry(intervals={"knn2": 0.5})]}),
        json.dumps({"results": [entry(dataset=["CIFAR-10"])]}),
        json.dumps({"results": [{k: v for k, v in ENTRY.items() if k != "data"}]}),
    ],
)
def test_a_damaged_file_is_named_and_left(run, content):
    (run / "results.json").write_text(content)
    for act in (lambda: append_result(run, ENTRY), lambda: compare([run])):
        with pytest.raises(UserError, match=r"results.json' is damaged .*mend it, or move it away"):
            act()
    assert (run / "results.json").read_text() == content


def test_bytes_that_are_no_text_are_damage(run):
    (run / "results.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="is damaged"):
        read_results(run)


@pytest.mark.parametrize("values", [{}, {"a": float("inf")}, {"a": None}, {"a": False}])
def test_what_is_no_number_is_not_written(run, values):
    with pytest.raises(ValueError, match="not a result"):
        append_result(run, entry(values=values))
    assert not (run / "results.json").exists()


# --- Side by side ---------------------------------------------------------------------------------

_ENTRIES = st.builds(
    entry,
    measure=st.sampled_from(["knn", "linear"]),
    protocol=st.sampled_from(["bank", "embeddings"]),
    data=st.sampled_from(["here", "there"]),
    fingerprint=st.sampled_from(["aa", "bb", None]),
    dataset=st.sampled_from(["CIFAR-10", None]),
    images=st.sampled_from([12, 13]),
    asked=st.sampled_from([11, 12]),
    training_fingerprint=st.sampled_from(["cc", "dd"]),
    training_images=st.sampled_from([48, 16]),
    known=st.sampled_from([16, 15]),
    values=st.dictionaries(st.sampled_from(["knn1", "top1"]), st.floats(0, 1), min_size=1),
    weights_digest=st.sampled_from(["0123456789", "9876543210"]),
)


@given(st.lists(st.lists(_ENTRIES, max_size=6), min_size=1, max_size=3))
def test_unlike_numbers_never_share_a_column(tmp_path_factory, runs):
    folders = [tmp_path_factory.mktemp("run") for _ in runs]
    for folder, entries in zip(folders, runs, strict=True):
        (folder / "results.json").write_text(json.dumps({"results": entries}))
    if not any(runs):
        with pytest.raises(UserError, match="Nothing was measured"):
            compare(folders)
        return
    found = compare(folders)
    json.dumps(found, allow_nan=False)
    cells = 0
    for row in found["rows"]:
        entries = runs[[str(folder) for folder in folders].index(row["run"])]
        several = len({e["weights_digest"] for e in entries}) > 1
        assert (row["weights"] is not None) == several
        for column, value in zip(found["columns"], row["values"], strict=True):
            same = [
                e["values"][column["name"]]
                for e in entries
                if _kind(e) == _kind(column)
                and column["name"] in e["values"]
                and (not several or row["weights"] == f"weights {e['weights_digest'][:8]}")
            ]
            assert value == (same[-1] if same else None)
            cells += value is not None
    printed = [cell for _, _, rows in tables(found) for row in rows for cell in row[1:] if cell]
    assert len(printed) == cells


def _kind(e):
    counts = ("images", "asked", "training_fingerprint", "training_images", "known")
    images = e["fingerprint"] or e["data"]
    return e["measure"], e["protocol"], images, e["dataset"], *(e[name] for name in counts)


def test_two_runs_on_other_images_have_tables_of_their_own(tmp_path):
    runs = []
    for name, fingerprint, value in (("a", "aa", 0.25), ("b", "bb", 0.5), ("c", "aa", 0.75)):
        runs.append(tmp_path / name)
        runs[-1].mkdir()
        append_result(runs[-1], entry(fingerprint=fingerprint, values={"knn1": value}))
    found = compare(runs)
    assert [row["values"] for row in found["rows"]] == [[0.25, None], [None, 0.5], [0.75, None]]
    assert found["notes"] == []
    first, second = tables(found)
    assert first[0] == "knn on pictures, 12 images: held-out images ask the memory bank"
    assert first[1:] == (["", "knn1"], [[str(runs[0]), "25.0%"], [str(runs[2]), "75.0%"]])
    assert second[1:] == (["", "knn1"], [[str(runs[1]), "50.0%"]])


def test_runs_without_results_are_named(tmp_path, run):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"Nothing was measured of .*run, .*empty yet"):
        compare([run, empty])
    append_result(run, ENTRY)
    found = compare([run, empty])
    assert [row["run"] for row in found["rows"]] == [str(run)]
    assert found["notes"] == [f"{empty} has no results yet; measure it with localagg knn {empty}."]


def test_weights_of_a_run_that_went_on_have_rows_of_their_own(run):
    append_result(run, entry(step=1000, values={"knn1": 0.25}))
    append_result(run, entry(step=2000, values={"knn1": 0.5}))
    append_result(run, entry(step=2000, values={"knn1": 0.75}))  # again
    (table,) = tables(compare([run]))
    assert table[2] == [[f"{run}, step 1,000", "25.0%"], [f"{run}, step 2,000", "75.0%"]]


def test_more_numbers_than_a_line_holds_go_down_the_page(tmp_path, run):
    names = [f"{layer} top{k}" for layer in range(5) for k in (1, 5)]
    append_result(run, entry(values=dict.fromkeys(names, 0.25)))
    other = tmp_path / "other"
    other.mkdir()
    append_result(other, entry(values={"0 top1": 0.5}))
    ((_, columns, rows),) = tables(compare([run, other]))
    assert columns == ["", str(run), str(other)]
    assert rows == [["0 top1", "25.0%", "50.0%"], *([name, "25.0%", ""] for name in names[1:])]


def test_counts_and_large_numbers_are_printed_as_they_are(run):
    append_result(run, entry(values={"classes": 1000, "inertia": 12345.678, "ari": -0.01}))
    ((_, _, rows),) = tables(compare([run]))
    assert rows[0][1:] == ["1,000", "1.235e+04", "-1.0%"]


def test_published_numbers_stand_beside_the_same_protocol_and_data_alone(run):
    views = ViewConfig(image_size=32, eval_crop=1.0)
    same = knn_protocol("the memory bank", views)
    other = knn_protocol("the memory bank", views, temperature=0.1)
    cifar = {"dataset": "CIFAR-10", "images": 10_000}
    append_result(run, entry(protocol=same, values={"knn1": 0.5, "knn200": 0.6}, **cifar))
    append_result(run, entry(protocol=other, values={"knn200": 0.7}, **cifar))
    append_result(run, entry(protocol=same, values={"knn200": 0.8}, fingerprint="other"))
    found = compare([run])
    published = [row for row in found["rows"] if row["published"]]
    assert [(row["run"], row["values"]) for row in published] == [
        ("IR, ResNet-18", [None, 0.808, None, None])
    ]
    assert "Wu et al. 2018" in published[0]["source"]
    for name in ("SimCLR", "MoCo", "BYOL"):
        (note,) = [note for note in found["notes"] if name in note]
        assert note.startswith("Published under another protocol, not to be compared")
    first = tables(found)[0]
    assert first[0].startswith("knn on pictures (CIFAR-10), 10,000 images: held-out images ask")
    assert first[2][1] == [f"IR, ResNet-18 (published: {published[0]['source']})", "", "80.8%"]


def of_the_recipe(**changes):
    """The protocol of the published read-outs, resolved, with these options changed."""
    recipe = readout_recipe("trans_res50_LA").config
    views = resolve_defaults(PretrainConfig(views=recipe.views), 1_281_167, 375).views
    return protocol(override(replace(recipe, views=views), **changes))


def test_the_published_linear_number_is_of_the_recipes_protocol():
    (number,) = [number for number in PUBLISHED if number.measure == "linear"]
    assert number.protocol == of_the_recipe()
    layer, _, name = number.value.partition(" ")
    assert layer in create_encoder("preact_resnet50", seed=0).layers
    assert name == "ten_crop_top1"


# Another value of each option of read-outs that decides what is measured.
DECIDING = {
    "compat": "reference",
    "image_size": 96,
    "augmentation": "torchvision",
    "crop": "fixed",
    "crop_area": (0.08, 1.0),
    "crop_aspect": (1.0, 1.0),
    "gray": 0.0,
    "jitter": (0.4, 0.4, 0.4, 0.1),
    "flip": 0.0,
    "eval_crop": 1.0,
    "exif_orientation": True,
    "epochs": 71,
    "drops": (30.0, 50.0),
    "batch_size": 8,
    "learning_rate": 1e-9,
    "momentum": 0.0,
    "weight_decay": 0.1,
    "finetune": True,
    "ten_crop": False,
}
HOW_IT_RUNS = {
    *("layers", "seed", "precision", "device", "workers", "memory", "memory_gb", "cache"),
    *("cache_gb", "unreadable", "eval_every", "log_every", "checkpoint_seconds"),
}


def test_no_run_that_deviates_from_the_recipe_stands_beside_the_published_number():
    assert {*DECIDING} | HOW_IT_RUNS == {*option_names(TransferConfig())}
    lines = {name: of_the_recipe(**{name: value}) for name, value in DECIDING.items()}
    assert len({of_the_recipe(), *lines.values()}) == 1 + len(DECIDING)
    assert of_the_recipe(seed=1, workers=0, layers=("17",)) == of_the_recipe()
    assert lines["learning_rate"] == of_the_recipe() + "; learning rate 1e-09 (not 0.01)"
    both = of_the_recipe(batch_size=8, crop_area=(0.5, 1.0))
    assert both.endswith("; crop area 0.5 1 (not 0.2 1); batch size 8 (not 128)")
    assert " by the number of images (not 128)" in of_the_recipe(batch_size=None)


def test_views_that_are_fixed_are_not_called_random():
    fixed = {"crop": "center", "flip": 0.0, "gray": 0.0, "jitter": (0.0, 0.0, 0.0, 0.0)}
    assert "70 epochs of the center crop (reference); center crop and" in of_the_recipe(**fixed)
    assert "random views" in of_the_recipe(**{**fixed, "flip": 0.5})


def test_fine_tuning_says_which_layers_teach_the_network():
    lines = {of_the_recipe(finetune=True, layers=layers) for layers in (("17",), ("1", "17"))}
    assert len(lines) == 2


def test_data_sets_are_known_by_their_counts():
    assert dataset_name(50_000, 10_000, 10) == "CIFAR-10"
    assert dataset_name(50_000, 10_000, 100) is None
    assert {number.dataset for number in PUBLISHED} <= set(DATASETS)
    assert all(0 < number.number < 1 for number in PUBLISHED)


def test_printing_results_needs_no_torch(run):
    append_result(run, ENTRY)
    check = (
        "import sys; from pathlib import Path; from localagg.evaluation.results_table import compare, tables;"
        f" print(len(tables(compare([Path({str(run)!r})]))), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]
