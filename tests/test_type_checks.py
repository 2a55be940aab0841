"""Values of other types than an option or argument has: one sentence, before any work."""

import inspect
import math
import types
from pathlib import Path
from typing import Union, get_args, get_origin

import numpy as np
import pytest
import torch
from expect import user_error

import localagg
from localagg import PretrainConfig, TransferConfig
from localagg.config import option_names, option_value, override
from localagg.data.inspect.inspect_dataset import inspect as inspect_data
from localagg.data.pack.pack_dataset import pack
from localagg.embeddings.clusters import cluster_images
from localagg.embeddings.compare import compare_tables
from localagg.embeddings.duplicates import find_duplicates
from localagg.embeddings.open_table import open_table
from localagg.embeddings.outliers import find_outliers
from localagg.embeddings.search import search
from localagg.embeddings.tables.write_table import write_embeddings
from localagg.evaluation.measure_run import measure_run
from localagg.evaluation.readouts.linear import resume_transfer
from localagg.interop.export import export
from localagg.interop.import_weights import import_weights
from localagg.interop.tf_variables import load_tf_checkpoint

NEVER_VALID = {
    "object": object(),
    "class": PretrainConfig,
    "bytes": b"x",
    "complex": 1j,
    "tensor": torch.ones(2),
    "NaN": math.nan,
    "infinite": math.inf,
    "beyond 64 bits, or negative": -(10**30),
    "nested": [["a"], 1],
}
OPTIONS = [
    (kind, name) for kind in (PretrainConfig, TransferConfig) for name in option_names(kind())
]
FUNCTIONS = [
    localagg.pretrain,
    localagg.resume,
    localagg.transfer,
    localagg.write_report,
    localagg.load,
    localagg.recipe,
    resume_transfer,
    measure_run,
    write_embeddings,
    open_table,
    search,
    compare_tables,
    cluster_images,
    find_outliers,
    find_duplicates,
    inspect_data,
    pack,
    export,
    import_weights,
    load_tf_checkpoint,
]


@pytest.mark.parametrize(("kind", "name"), OPTIONS)
def test_an_option_of_another_type_is_one_sentence(kind, name):
    for shown, value in NEVER_VALID.items():
        with user_error("option-invalid", f"--{name.replace('_', '-')} ") as raised:
            override(kind(), **{name: value})
        assert "\n" not in str(raised.value), shown
    if not isinstance(option_value(kind(), name), bool):
        with user_error("option-invalid"):
            override(kind(), **{name: True})


def test_lists_paths_and_numbers_of_numpy_are_taken_as_what_they_mean():
    config = override(
        PretrainConfig(),
        clusters=[np.int64(3), 4],
        weights=Path("w.safetensors"),
        temperature=np.float32(0.5),
        epochs=np.int32(3),
    )
    assert config.objective.clusters == (3, 4)
    assert type(config.objective.clusters[0]) is int
    assert config.encoder.weights == "w.safetensors"
    assert config.objective.temperature == 0.5
    assert type(config.epochs) is int


def checked_parameters():
    for function in FUNCTIONS:
        for name, parameter in inspect.signature(function).parameters.items():
            kind = parameter.annotation
            if not isinstance(kind, str) and "Any" not in str(kind):
                yield pytest.param(function, name, kind, id=f"{function.__name__}-{name}")


def valid_value(kind):
    arms = get_args(kind) if get_origin(kind) in (types.UnionType, Union) else (kind,)
    by_kind = {PretrainConfig: PretrainConfig(), TransferConfig: TransferConfig()}
    known = [by_kind[arm] for arm in arms if arm in by_kind]
    encoder = [
        localagg.create_encoder("resnet18_small", width=8) for arm in arms if "Encoder" in str(arm)
    ]
    return next(iter(known + encoder), "nowhere")


def wrong_values(kind):
    arms = get_args(kind) if get_origin(kind) in (types.UnionType, Union) else (kind,)
    yield from (object(), b"x", torch.ones(2), 1j)
    if type(None) not in arms:
        yield None
    if bool not in arms:
        yield True
    if Path in arms:
        yield from ("a\0b", "x" * 300, 3)


@pytest.mark.parametrize(("function", "name", "kind"), checked_parameters())
def test_an_argument_of_another_type_is_one_sentence_before_any_work(
    function, name, kind, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    required = {
        other: [1] if other in ("k", "images") else valid_value(parameter.annotation)
        for other, parameter in inspect.signature(function).parameters.items()
        if parameter.default is inspect.Parameter.empty
    }
    for value in wrong_values(kind):
        with user_error("option-invalid", f"{name} is ") as raised:
            function(**{**required, name: value})
        assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_names_of_typed_options_are_names_of_the_given_configuration(tmp_path):
    for config, names in ((PretrainConfig(), ["epoch"]), (None, ["epochs"])):
        with user_error("option-unknown"):
            localagg.resume(tmp_path / "run", config, typed=names)
    with user_error("option-unknown"):
        localagg.pretrain(PretrainConfig(), tmp_path, tmp_path / "run", typed=["epoch"])
    with user_error("option-invalid"):
        localagg.pretrain(PretrainConfig(), tmp_path, tmp_path / "run", rank_timeout=-1)
