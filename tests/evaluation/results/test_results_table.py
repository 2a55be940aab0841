"""Results side by side: unlike numbers keep apart, published ones stand by the same protocol."""

import json
import subprocess
import sys
from dataclasses import replace

from expect import user_error
from hypothesis import given
from hypothesis import strategies as st
from small_results import ENTRY, entry

from localagg.config import PretrainConfig, TransferConfig, ViewConfig, option_names, override
from localagg.evaluation.results.protocols import (
    BANK,
    describe_protocol,
    is_fixed,
    knn_protocol,
    linear_protocol,
)
from localagg.evaluation.results.published import DATASETS, PUBLISHED, dataset_name
from localagg.evaluation.results.results_file import append_result
from localagg.evaluation.results.results_table import compare, tables
from localagg.models import create_encoder
from localagg.recipes.builtin import readout_recipe
from localagg.recipes.derived_settings import resolve_defaults

_ENTRIES = st.builds(
    entry,
    measure=st.sampled_from(["knn", "linear"]),
    protocol=st.sampled_from(["a sentence of an earlier version", {"method": "knn", "k": [1]}]),
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
        with user_error("not-found", folders[0]):
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
    assert first[0] == f"knn on pictures, 12 images: {ENTRY['protocol']}"
    assert first[1:] == (["", "knn1"], [[str(runs[0]), "25.0%"], [str(runs[2]), "75.0%"]])
    assert second[1:] == (["", "knn1"], [[str(runs[1]), "50.0%"]])


def test_runs_without_results_are_named(tmp_path, run):
    empty = tmp_path / "empty"
    empty.mkdir()
    with user_error("not-found", run, empty):
        compare([run, empty])
    append_result(run, ENTRY)
    found = compare([run, empty])
    assert [row["run"] for row in found["rows"]] == [str(run)]
    assert [str(empty) in note for note in found["notes"]] == [True]


def test_several_weights_of_a_run_have_rows_of_their_own(run):
    append_result(run, entry(step=1000, values={"knn1": 0.25}))
    append_result(run, entry(step=2000, values={"knn1": 0.5}))
    append_result(run, entry(step=2000, values={"knn1": 0.75}))  # again
    (table,) = tables(compare([run]))
    assert table[2] == [[f"{run}, step 1,000", "25.0%"], [f"{run}, step 2,000", "75.0%"]]


def test_wide_tables_are_transposed(tmp_path, run):
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
    same, other = knn_protocol(BANK, views), knn_protocol(BANK, views, temperature=0.1)
    cifar = {"dataset": "CIFAR-10", "images": 10_000}
    append_result(run, entry(protocol=same, values={"knn1": 0.5, "knn200": 0.6}, **cifar))
    append_result(run, entry(protocol=other, values={"knn200": 0.7}, **cifar))
    append_result(run, entry(protocol=same, values={"knn200": 0.8}, fingerprint="other"))
    found = compare([run])
    published = [row for row in found["rows"] if row["published"]]
    assert [(row["run"], row["values"]) for row in published] == [
        ("IR, ResNet-18", [None, 0.808, None, None])
    ]
    for name in ("SimCLR", "MoCo", "BYOL"):
        assert len([note for note in found["notes"] if name in note]) == 1
    (title, _, rows), *_ = tables(found)
    assert title.startswith("knn on pictures (CIFAR-10), 10,000 images: ")
    assert rows[1] == [f"IR, ResNet-18 (published: {published[0]['source']})", "", "80.8%"]


# --- Protocols ------------------------------------------------------------------------------------


def of_the_recipe(**changes):
    """The protocol of the published read-outs, resolved, with these options changed."""
    recipe = readout_recipe("trans_res50_LA").config
    views = resolve_defaults(PretrainConfig(views=recipe.views), 1_281_167, 375).views
    return linear_protocol(override(replace(recipe, views=views), **changes))


def test_the_published_linear_number_is_of_the_recipes_protocol():
    (number,) = [number for number in PUBLISHED if number.measure == "linear"]
    assert number.protocol == of_the_recipe()
    layer, _, name = number.value.partition(" ")
    assert layer in create_encoder("preact_resnet50", seed=0).layers
    assert name == "ten_crop_top1"


# Another value of each option of read-outs that decides the numbers.
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
    "range": (0.0, 4095.0),
    "bands": (3, 2, 1),
    "epochs": 71,
    "drops": (30.0, 50.0),
    "batch_size": 8,
    "learning_rate": 1e-9,
    "momentum": 0.0,
    "weight_decay": 0.1,
    "finetune": True,
    "ten_crop": False,
}
WITHOUT_EFFECT = {
    *("layers", "seed", "precision", "device", "workers", "memory", "memory_gb", "cache"),
    *("cache_gb", "unreadable", "eval_every", "log_every", "checkpoint_seconds"),
}


def test_every_option_that_decides_the_numbers_is_part_of_the_protocol():
    assert {*DECIDING} | WITHOUT_EFFECT == {*option_names(TransferConfig())}
    protocols = {name: of_the_recipe(**{name: value}) for name, value in DECIDING.items()}
    distinct = {json.dumps(found) for found in (of_the_recipe(), *protocols.values())}
    assert len(distinct) == 1 + len(DECIDING)
    assert len({describe_protocol(json.loads(found)) for found in distinct}) == 1 + len(DECIDING)
    assert of_the_recipe(seed=1, workers=0, layers=("17",)) == of_the_recipe()
    assert json.loads(json.dumps(protocols)) == protocols


def test_deviations_from_the_published_recipe_name_both_values():
    changed = of_the_recipe(learning_rate=1e-9, batch_size=8, crop_area=(0.5, 1.0))
    line = describe_protocol(changed)
    for words in ("learning rate 1e-09 (not 0.01)", "crop area 0.5 1 (not 0.2 1)"):
        assert words in line
    assert "batch size by the number of images (not 128)" in describe_protocol(
        of_the_recipe(batch_size=None)
    )
    assert "(not" not in describe_protocol(of_the_recipe())


def test_the_layers_are_part_of_the_protocol_of_fine_tuning_alone():
    tuned = [of_the_recipe(finetune=True, layers=layers) for layers in (("17",), ("1", "17"))]
    assert tuned[0] != tuned[1]


def test_sentences_of_earlier_versions_are_shown_as_they_are(run):
    append_result(run, entry(protocol="held-out images ask the memory bank"))
    ((title, _, _),) = tables(compare([run]))
    assert title.endswith(": held-out images ask the memory bank")


def test_only_views_without_randomness_are_fixed():
    still = ViewConfig(crop="center", flip=0.0, gray=0.0, jitter=(0.0, 0.0, 0.0, 0.0))
    assert is_fixed(still)
    moving = ({"crop": "fixed"}, {"crop": "resized", "crop_area": (1.0, 1.0)}, {"flip": 0.1})
    for change in (*moving, {"gray": 0.1}, {"jitter": (0.0, 0.0, 0.0, 0.1)}):
        assert not is_fixed(replace(still, **change))


def test_data_sets_are_identified_by_their_counts():
    assert dataset_name(50_000, 10_000, 10) == "CIFAR-10"
    assert dataset_name(50_000, 10_000, 100) is None
    assert {number.dataset for number in PUBLISHED} <= set(DATASETS)
    assert all(0 < number.number < 1 for number in PUBLISHED)


def test_printing_results_needs_no_torch(run):
    append_result(run, ENTRY)
    check = (
        "import sys; from pathlib import Path;"
        " from localagg.evaluation.results.results_table import compare, tables;"
        f" print(len(tables(compare([Path({str(run)!r})]))), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]
