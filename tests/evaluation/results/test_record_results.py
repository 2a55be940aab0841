"""Recorded results name images, counts and weights, and join the right columns."""

import shutil

import pytest

from localagg.checkpoint import save_weights, weights_digest
from localagg.config import ViewConfig
from localagg.data.sources.open import open_images
from localagg.evaluation.measure_run import measure_run
from localagg.evaluation.results import published
from localagg.evaluation.results.protocols import LEAVE_ONE_OUT
from localagg.evaluation.results.record_results import (
    is_recorded,
    record_knn,
    record_low_shot,
    record_readouts,
)
from localagg.evaluation.results.results_file import append_result, read_results
from localagg.evaluation.results.results_table import compare, tables
from localagg.models import create_encoder


def small(seed=0):
    return create_encoder("resnet18_small", dim=12, width=8, blocks=(1,), seed=seed)


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "small.safetensors"
    save_weights(path, small(), ViewConfig(image_size=32, eval_crop=1.0))
    return path


@pytest.fixture
def fewer(pictures, tmp_path):
    """The same held-out images, and 16 of the 48 training images."""
    shutil.copytree(pictures, data := tmp_path / "fewer")
    for name in ("temple", "flower"):
        for file in sorted((data / "train" / name).iterdir())[8:]:
            file.unlink()
    return data


def measured(weights, data, **options):
    options = {"against": "embeddings", "k": (1, 200), "workers": 0, **options}
    result = measure_run(weights, data=str(data), **options)
    record_knn(weights, result)
    return result


def test_other_training_images_are_another_column(weights, pictures, fewer):
    for data in (pictures, fewer):
        measured(weights, data, clusters=True, retrieval=True)
    found = compare([weights])
    of_48 = [column for column in found["columns"] if 48 in (column["known"], column["images"])]
    assert len(found["columns"]) == 2 * len(of_48)
    (row,) = found["rows"]
    assert None not in row["values"]
    assert [entry.get("training_images") for entry in read_results(weights)] == [48] * 3 + [16] * 3
    titles = [title for title, _, _ in tables(found) if title.startswith("knn")]
    assert [", 12 images, 48 training images: " in title for title in titles] == [True, False]


def test_a_part_of_a_data_set_never_stands_beside_its_published_number(
    weights, pictures, fewer, monkeypatch
):
    monkeypatch.setitem(published.DATASETS, "CIFAR-10", (48, 12, 2))
    for data in (fewer, pictures):
        result = measure_run(weights, data=str(data), against="embeddings", k=(200,), workers=0)
        record_knn(weights, {**result, "against": "the memory bank"})
    found = compare([weights])
    assert [column["training_images"] for column in found["columns"]] == [16, 48]
    (known,) = [row for row in found["rows"] if row["published"]]
    assert known["values"] == [None, 0.808]


def test_entries_that_name_no_training_images_keep_their_data_set_apart(tmp_path):
    """As written before the training images were noted."""
    entry = {"measure": "knn", "protocol": published.CIFAR_KNN, "data": "d", "fingerprint": "aa"}
    whole = {**entry, "dataset": "CIFAR-10", "values": {"knn200": 0.75}}
    for old in ({**entry, "values": {"knn200": 0.25}}, whole):
        append_result(tmp_path, old)
    found = compare([tmp_path])
    assert [row["values"] for row in found["rows"]] == [[0.25, 0.75], [None, 0.808]]


def test_held_out_images_without_labels_are_not_queries(weights, pictures, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pictures / "train", data / "train")
    shutil.copytree(pictures / "val" / "temple", data / "val")
    measured(weights, data, retrieval=True)
    source = open_images(data)
    for entry in read_results(weights):
        assert entry["protocol"]["queries"] == LEAVE_ONE_OUT
        assert (entry["fingerprint"], entry["images"]) == (source.fingerprint(), 48)
        assert all(name.startswith("loo_") for name in entry["values"])


def test_clusters_are_of_the_training_images(weights, pictures):
    measured(weights, pictures, clusters=True)
    vote, clusters = read_results(weights)
    source, held_out = open_images(pictures), open_images(pictures, "val")
    assert (vote["fingerprint"], vote["images"]) == (held_out.fingerprint(), 12)
    assert (clusters["fingerprint"], clusters["images"]) == (source.fingerprint(), 48)
    assert (vote["asked"], vote["known"], clusters["asked"]) == (12, 48, 48)
    assert [", 48 images: k-means" in title for title, _, _ in tables(compare([weights]))] == [
        *(False, True),
    ]


def test_left_out_images_and_capped_votes_are_recorded(weights, pictures, tmp_path):
    shutil.copytree(pictures, data := tmp_path / "data")
    for name in ("train/temple/05.jpg", "train/flower/00.png", "val/flower/01.jpg"):
        (data / name).write_bytes(b"no image")
    result = measured(weights, data)
    (entry,) = read_results(weights)
    assert (entry["images"], entry["asked"], entry["training_images"], entry["known"]) == (
        *(12, 11, 48, 46),
    )
    assert entry["left_out"] == result["left_out"]
    assert entry["left_out"]["known"]["unreadable"] == 2
    assert entry["capped"] == {"200": 46}
    ((title, _, _),) = tables(compare([weights]))
    assert ", 11 of 12 images, 46 of 48 training images: " in title


def test_weights_are_those_that_were_loaded(weights, pictures):
    result = measure_run(weights, data=str(pictures), against="embeddings", k=(1,), workers=0)
    save_weights(weights, small(seed=1), ViewConfig(image_size=32))  # the run went on
    record_knn(weights, result)
    (entry,) = read_results(weights)
    assert entry["weights_digest"] == weights_digest(small())


READ_OUT = {
    **{"data": "digits", "weights_digest": "aa", "measured": 396, "unreadable": 1},
    **{"device": "cpu", "precision": "32-true"},
}


def test_readouts_record_the_images_learned_from_and_measured(weights):
    layers = {"1": {"top1": 0.5}}
    protocol = {"method": "linear"}
    result = {**READ_OUT, "layers": layers, "protocol": protocol, "images": 1400}
    assert not is_recorded(weights, result)
    record_readouts(weights, result)
    assert is_recorded(weights, result)
    (entry,) = read_results(weights)
    assert entry["values"] == {"1 top1": 0.5}
    assert (entry["images"], entry["asked"], entry["known"]) == (397, 396, 1400)
    assert entry["left_out"] == {"unreadable": 1}


def test_low_shot_results_keep_their_intervals(weights):
    spread = {"mean": 0.5, "interval": 0.0125, "values": [0.49, 0.51]}
    single = {"mean": 0.5, "interval": None, "values": [0.5]}
    subsets = [
        {"few": 0.1, "images": 140, "linear": {"2": {"top1": spread}}},
        {"per_class": 3, "images": 30, "linear": {"2": {"top1": single}}},
    ]
    protocol = {"linear": {"method": "quick"}, "finetuned": {"method": "not measured"}}
    record_low_shot(
        weights, {**READ_OUT, "subsets": subsets, "seeds": [0, 1], "protocol": protocol}
    )
    (entry,) = read_results(weights)
    assert entry["protocol"] == {"method": "quick", "draws": 2}
    assert entry["values"] == {"0.1 2 top1": 0.5, "3 a class 2 top1": 0.5}
    assert entry["intervals"] == {"0.1 2 top1": 0.0125}
    assert (entry["asked"], entry["left_out"]) == (396, {"unreadable": 1})
    ((_, _, rows),) = tables(compare([weights]))
    assert rows == [[str(weights), "50.0% ± 1.2", "50.0%"]]
