import json

import pytest
from expect import user_error

from localagg.config import override
from localagg.recipes.builtin import READOUT_RECIPES, recipe
from localagg.recipes.from_reference_json import (
    convert_pretrain_json,
    convert_readout_json,
    read_json,
)

LA = {
    "exp_id": "mine",
    "port": 27009,
    "task": "LA",
    "db_name": "a",
    "col_name": "b",
    "load_exp": "a/b/res18_IR",
    "load_step": 100090,
    "kmeans_k": ",".join(["30000"] * 10),
    "lr_boundaries": "1600000,1873411",
    "train_num_steps": 2001800,
    "fre_filter": 100090,
}


@pytest.fixture
def write(tmp_path):
    def write(text) -> str:
        path = tmp_path / "c.json"
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        return str(path)

    return write


def test_the_references_la_equals_our_recipe(write):
    config, notes = convert_pretrain_json(write({"res18_LA": LA}) + ":res18_LA")
    assert config == recipe("res18_LA").config
    listed = " ".join(notes)
    assert all(key in listed for key in ("exp_id", "port", "db_name", "col_name", "load_exp"))
    assert "10 epochs" in listed
    assert "kmeans_k" not in listed


def test_every_value_is_converted(write):
    values = {
        "model_type": "vggnet_fx", "batch_size": "64", "init_lr": 0.5, "weight_decay": 0,
        "instance_t": 0.1, "instance_m": 0.9, "instance_k": 128, "kmeans_k": "20", "data_len": 6400,
        "lr_boundaries": "150", "train_num_steps": 400, "task": "IR",
    }  # fmt: skip
    config, notes = convert_pretrain_json(write(values))
    assert notes == []
    expected = override(
        recipe("res18_IR").config,
        model="vgg16_bn_last", batch_size=64, learning_rate=0.5, weight_decay=0.0,
        temperature=0.1, bank_momentum=0.9, neighbors=128, noise=128, clusters=(20,),
        sized_for=6400, drops=(1.5,), epochs=4, ir_epochs=4,
    )  # fmt: skip
    assert config == expected


def test_a_configuration_overrides_the_named_recipe(write):
    path = write({"x": {"init_lr": 0.1}})
    config, _ = convert_pretrain_json(path + ":x", recipe("vggnet_LA").config)
    assert config == override(
        recipe("vggnet_LA").config, learning_rate=0.1, sized_for=config.sized_for
    )


def test_comments_are_skipped_and_ignored_keys_are_named(write):
    text = '// made by hand\n{"x": {\n  // slow\n  "task": "LA", "kmeans_kk": "5", "gpu": "0"}}'
    _, notes = convert_pretrain_json(write(text) + ":x")
    assert len(notes) == 2
    assert all(name in notes[0] for name in ("kmeans_kk", "'kmeans_k'"))
    assert "gpu" in notes[1]
    assert "--device" in notes[1]


def test_a_partial_last_epoch_is_noted(write):
    config, notes = convert_pretrain_json(write({"train_num_steps": 10_010, "task": "IR"}))
    assert config.epochs == 2
    assert all(value in notes[0] for value in ("train_num_steps 10,010", "10,009", "2 epochs"))


def test_readouts_equal_our_recipes(write):
    begin = 2_001_800
    values = {
        "save_exp": "a/b/c", "port": 1, "ten_crop": True, "get_all_layers": "1,3,5,7,9",
        "load_step": begin, "lr_boundaries": "2302070,2602340", "train_num_steps": 2702430,
    }  # fmt: skip
    for name, more in (
        ("trans_res18_LA", {}),
        ("plc_trans_res18_LA", {"num_classes": 205, "train_crop": "alexnet_crop_flip"}),
    ):
        config, notes = convert_readout_json(write({"z": {**values, **more}}) + ":z")
        assert config == READOUT_RECIPES[name].config
        assert any(note.startswith("port ") for note in notes)


@pytest.mark.parametrize(
    ("text", "name", "code", "value"),
    [
        (None, "", "not-found", "file.json"),
        ("{", "", "damaged", "c.json"),
        ("[1]", "", "unsupported", "c.json"),
        ({"res18_LA": {}}, ":res81_LA", "not-found", "'res18_LA'"),
        ({"res18_LA": {}}, "", "option-missing", "c.json:res18_LA"),
        ({"batch_size": "many"}, "", "option-invalid", "'many'"),
        ({"batch_size": 0}, "", "option-invalid", "c.json"),
        ({"kmeans_k": [3]}, "", "option-invalid", "'[3]'"),
        ({"model_type": "resnet34"}, "", "option-invalid", "model_type 'resnet34'"),
        ({"data_len": 10}, "", "option-invalid", "data_len 10"),
        ({"lr_boundaries": "1;2"}, "", "option-invalid", "'1;2'"),
        ({"init_lr": -1}, "", "option-invalid", "--learning-rate"),
        ({"get_all_layers": "1"}, "", "option-invalid", "localagg transfer RUN"),
    ],
)
def test_an_invalid_file_raises(write, text, name, code, value):
    path = "/no/such/file.json" if text is None else write(text)
    with user_error(code, value) as caught:
        convert_pretrain_json(path + name)
    assert "\n" not in str(caught.value)


def test_an_invalid_readout_value_raises(write):
    with user_error("option-invalid", "weird"):
        convert_readout_json(write({"train_crop": "weird"}))


def test_a_configuration_is_found_by_name(write):
    path = write({"a": {"task": "IR"}, "b": {"task": "LA"}})
    assert read_json(f"{path}:b") == ("b", {"task": "LA"})
