"""Wrong arguments of public functions: one sentence with a code, and no result."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from expect import user_error

from localagg import UserError, create_encoder, embed, objectives, open_images, recipe
from localagg.bank import MemoryBank
from localagg.clustering import cluster, kmeans
from localagg.config import ViewConfig
from localagg.evaluation.knn import knn_accuracy, nearest_rows, retrieval_scores

B, N, D = 3, 12, 4
GENERATOR = torch.Generator().manual_seed(0)
BANK = F.normalize(torch.randn(N, D, generator=GENERATOR), dim=1)
ROWS, INDEX = BANK[:B].clone(), torch.tensor([0, 5, 11])
LABELS = torch.arange(2 * N).view(2, N) % 3
NOISE = torch.randint(0, N, (B, 6), generator=GENERATOR)
CLASSES = torch.arange(N) % 3

ROWS_INVALID = {
    "numpy": ROWS.numpy(),
    "list": ROWS.tolist(),
    "None": None,
    "integers": (ROWS * 9).long(),
    "booleans": ROWS > 0,
    "complex": ROWS.to(torch.complex64),
    "sparse": ROWS.to_sparse(),
    "one row": ROWS[0],
    "3-D": ROWS[None],
    "another D": ROWS[:, :2],
    "another device": ROWS.to("meta"),
}
INDEX_INVALID = {
    "numpy": INDEX.numpy(),
    "list": INDEX.tolist(),
    "None": None,
    "floats": INDEX.float(),
    "booleans": INDEX > 0,
    "uint8, a mask in torch": INDEX.to(torch.uint8),
    "too few": INDEX[:2],
    "2-D": INDEX[None],
    "beyond the end": INDEX + 1,
    "negative": INDEX - 1,
    "another device": INDEX.to("meta"),
}
NUMBERS_INVALID = {
    "text": "0.07", "None": None, "boolean": True, "NaN": float("nan"), "infinite": float("inf"),
    "negative": -0.1,
}  # fmt: skip
COUNTS_INVALID = {"text": "3", "None": None, "boolean": True, "fraction": 2.5, "0": 0, "-1": -1}
ABOVE_0 = NUMBERS_INVALID | {"0": 0}


def updated(index, embedding, momentum=0.5):
    MemoryBank(N, D).update(index, embedding, momentum=momentum)


KNN = {
    "valid": {"queries": ROWS, "query_labels": CLASSES[:B], "bank": BANK, "bank_labels": CLASSES},
    "queries": ROWS_INVALID | {"no rows": ROWS[:0]},
    "query_labels": {
        "numpy": CLASSES[:B].numpy(), "list": [0, 1, 2], "floats": CLASSES[:B].float(),
        "one, which would be repeated": CLASSES[:1], "a column": CLASSES[:B, None],
        "missing labels": CLASSES[:B] - 1,
    },
    "bank": ROWS_INVALID | {"no rows": BANK[:0]},
    "bank_labels": {
        "list": CLASSES.tolist(), "floats": CLASSES.float(), "too few": CLASSES[:4],
        "too many": CLASSES.repeat(2), "missing labels": CLASSES - 1, "words": ["a"] * N,
    },
    "k": {
        "number": 5, "text": "5", "None": None, "empty": [], "0": [0], "fraction": [2.5],
        "boolean": [True], "array": np.array([1, 2]), "iterator": iter([1, 2]),
    },
    "exclude": INDEX_INVALID | {"None": True, "uint8, a mask in torch": INDEX.float()},
}  # fmt: skip
LOSS = {
    "embedding": ROWS_INVALID | {"no rows": ROWS[:0]},
    "bank": {**ROWS_INVALID, "no rows": BANK[:0], "MemoryBank": MemoryBank(N, D)},
}
LABELS_INVALID = {
    "numpy": LABELS.numpy(), "list": LABELS.tolist(), "floats": LABELS.float(),
    "booleans": LABELS > 0, "one clustering": LABELS[0], "transposed": LABELS.T,
    "too few": LABELS[:, :5], "another device": LABELS.to("meta"),
}  # fmt: skip
FUNCTIONS = {
    objectives.local_aggregation: {
        "valid": {"embedding": ROWS, "bank": BANK, "labels": LABELS, "index": INDEX},
        **LOSS, "labels": LABELS_INVALID, "index": INDEX_INVALID, "neighbors": COUNTS_INVALID,
        "temperature": ABOVE_0, "eps": NUMBERS_INVALID,
    },
    objectives.instance_nce: {
        "valid": {"embedding": ROWS, "bank": BANK, "index": INDEX, "noise_index": NOISE},
        **LOSS, "index": INDEX_INVALID, "temperature": ABOVE_0,
        "noise_index": {
            "1-D": INDEX, "floats": NOISE.float(), "too few": NOISE[:2], "beyond": NOISE + N,
            "negative": NOISE - N, "numpy": NOISE.numpy(),
        },
    },
    objectives.instance_softmax: {
        "valid": {"embedding": ROWS, "bank": BANK, "index": INDEX},
        **LOSS, "index": INDEX_INVALID, "temperature": ABOVE_0,
        "precision": {"another": "float16", "none": None},
    },
    objectives.probability: {
        "valid": {"embedding": ROWS, "bank": BANK},
        "embedding": ROWS_INVALID, "bank": ROWS_INVALID, "temperature": ABOVE_0,
    },
    objectives.background_neighbors: {
        "valid": {"embedding": ROWS, "bank": BANK, "neighbors": 3},
        **LOSS, "neighbors": COUNTS_INVALID,
    },
    objectives.close_neighbors: {
        "valid": {"labels": LABELS, "index": INDEX, "rows": NOISE},
        "labels": {"1-D": LABELS[0], "floats": LABELS.float(), "list": LABELS.tolist()},
        "index": {k: v for k, v in INDEX_INVALID.items() if k != "too few"},
        "rows": {"1-D": INDEX, "floats": NOISE.float(), "too few": NOISE[:2]},
    },
    objectives.momentum_update: {
        "valid": {"rows": BANK[3:6], "embedding": ROWS},
        "rows": ROWS_INVALID | {"too few": BANK[:1]}, "embedding": ROWS_INVALID,
        "momentum": NUMBERS_INVALID | {"2": 2},
    },
    MemoryBank: {
        "valid": {"size": N, "dim": D}, "size": COUNTS_INVALID, "dim": COUNTS_INVALID,
        "seed": {"text": "0", "None": None, "negative": -1, "fraction": 0.5},
        "dtype": {"text": "float32", "numpy": np.float32, "integer": torch.int64, "None": None},
        "device": {"no such device": "gpu", "another number": 99},
    },
    updated: {
        "valid": {"index": INDEX, "embedding": ROWS}, "index": INDEX_INVALID,
        "embedding": ROWS_INVALID, "momentum": NUMBERS_INVALID | {"2": 2},
    },
    kmeans: {
        "valid": {"rows": BANK, "clusters": 3},
        "rows": {k: v for k, v in ROWS_INVALID.items() if k != "another D"},
        "clusters": COUNTS_INVALID | {"too many": N + 1}, "engine": {"unknown": "x"},
        "seed": {"text": "0", "None": None, "negative": -1, "beyond int32": 2**31},
        "iterations": {"text": "0", "None": None, "negative": -1, "fraction": 2.5},
        "tolerance": NUMBERS_INVALID,
        "start": {
            "labels beyond k": LABELS[0] + 1, "negative": LABELS[0] - 1, "too few": LABELS[0, :5],
            "2-D": LABELS, "list": LABELS[0].tolist(), "text": "x", "fewer centroids": BANK[:2],
            "another D": BANK[:3, :2],
        },
    },
    cluster: {
        "valid": {"bank": BANK, "clusters": [3, 4]},
        "bank": {k: v for k, v in ROWS_INVALID.items() if k != "another D"},
        "clusters": {"number": 3, "text": "3", "None": None, "0": [0], "fraction": [2.5]},
        "start": {"one clustering": LABELS[:1], "centroids of one": [BANK[:3]], "text": "xy"},
        "seed": {"text": "0", "None": None, "boolean": True}, "engine": {"None": None},
    },
    knn_accuracy: KNN | {"temperature": ABOVE_0},
    retrieval_scores: KNN,
    nearest_rows: {
        "valid": {"queries": ROWS, "bank": BANK, "k": 2}, "queries": ROWS_INVALID,
        "bank": ROWS_INVALID, "k": COUNTS_INVALID | {"too many": N + 1}, "batch": COUNTS_INVALID,
        "exclude": {k: v for k, v in INDEX_INVALID.items() if k != "None"},
    },
}  # fmt: skip
CASES = [
    pytest.param(function, {**table["valid"], name: value}, id=f"{function.__name__}-{name}-{kind}")
    for function, table in FUNCTIONS.items()
    for name, invalid in table.items()
    if name != "valid"
    for kind, value in invalid.items()
]


@pytest.mark.parametrize(("function", "arguments"), CASES)
def test_a_wrong_argument_is_one_sentence(function, arguments, request):
    codes = {"missing labels": "no-labels", "another number": "environment"}
    codes |= {"no such device": "environment"}
    kind = request.node.callspec.id.rpartition("-")[2]
    code = codes.get(kind, "option-invalid")
    if kind == "no rows" and function in (knn_accuracy, retrieval_scores):
        code = "no-images"
    with user_error(code) as caught:
        function(**arguments)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


ENCODER = create_encoder("resnet18_small", 4, width=2, blocks=(1,)).eval()
IMAGES = torch.zeros(2, 3, 8, 8)
OTHERS = {
    create_encoder: {
        "valid": {"model": "resnet18_small", "dim": 4, "width": 2, "blocks": (1,)},
        "model": {"None": None, "number": 3, "Path": Path("resnet18")}, "dim": COUNTS_INVALID,
        "seed": {"text": "x", "negative": -1, "fraction": 1.5}, "head_layers": {"boolean": True},
        "width": COUNTS_INVALID, "blocks": {"none": (), "0": (0,), "text": "ab"},
        "stem_stride": COUNTS_INVALID,
    },
    ENCODER.forward: {
        "valid": {"images": IMAGES},
        "images": {
            "numpy": IMAGES.numpy(), "list": [1], "None": None, "path": "a.jpg",
            "no pixels": IMAGES[:, :, :0], "another device": IMAGES.to("meta"),
        },
    },
    ENCODER.features: {"valid": {"images": IMAGES, "layers": ["0"]}, "layers": {"fraction": 3.5}},
    open_images: {
        "valid": {"uri": "digits"},
        "uri": {"None": None, "number": 3, "bytes": b"digits", "list": ["a"], "empty": "",
            "no such user": "~nobody-of-this-name/images",
        },
        "split": {"None": None, "list": ["train"], "number": 3, "bytes": b"train"},
    },
    embed: {
        "valid": {"encoder": ENCODER, "source": IMAGES, "views": ViewConfig(image_size=8)},
        "encoder": {"None": None, "text": "run", "module": torch.nn.Linear(2, 2)},
        "source": {"None": None, "number": 3}, "views": {"None": None, "number": 8},
        "batch": COUNTS_INVALID, "workers": {"text": "2", "negative": -1, "fraction": 2.0},
        "pixels": {"numpy": np.zeros((2, 3, 8, 8), np.uint8), "too few": IMAGES[:1].byte()},
        "on_progress": {"None": None, "text": "x"},
    },
    recipe: {"valid": {"name": "digits"}, "name": {"None": None, "number": 3}},
}  # fmt: skip
OTHER_CASES = [
    pytest.param(function, {**table["valid"], name: value}, id=f"{function.__name__}-{name}-{kind}")
    for function, table in OTHERS.items()
    for name, invalid in table.items()
    if name != "valid"
    for kind, value in invalid.items()
]


@pytest.mark.parametrize(("function", "arguments"), OTHER_CASES)
def test_a_wrong_network_image_or_place_is_one_sentence(function, arguments):
    with pytest.raises(UserError) as caught:
        function(**arguments)
    assert caught.value.code in ("option-invalid", "option-unknown", "not-found")
    assert "\n" not in str(caught.value)


def test_the_encoder_takes_float64_images_and_one_layer():
    torch.testing.assert_close(ENCODER(IMAGES.double()), ENCODER(IMAGES))
    assert list(ENCODER.features(IMAGES, 1)) == list(ENCODER.features(IMAGES, "1")) == ["1"]
    assert embed(ENCODER, IMAGES, ViewConfig(image_size=8)).rows.shape == (2, 4)


def test_valid_arguments_of_each_function_pass():
    for function, table in (FUNCTIONS | OTHERS).items():
        function(**table["valid"])


def test_integers_of_numpy_and_classes_of_any_size_are_taken():
    arguments = {"neighbors": np.int64(3), "temperature": np.float32(0.07)}
    expected = objectives.local_aggregation(ROWS, BANK, LABELS, INDEX, neighbors=3)
    found = objectives.local_aggregation(ROWS, BANK, LABELS, INDEX.int(), **arguments)
    torch.testing.assert_close(found, expected)
    votes = knn_accuracy(ROWS, CLASSES[:B], BANK, CLASSES, k=[1, 5])
    assert knn_accuracy(ROWS, CLASSES[:B] + 10**12, BANK, CLASSES + 10**12, k=[1, 5]) == votes
