import json

import pytest

from localagg.config import override
from localagg.errors import UserError
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


def test_the_references_la_is_our_recipe(write):
    config, notes = convert_pretrain_json(write({"res18_LA": LA}) + ":res18_LA")
    assert config == recipe("res18_LA").config
    told = " ".join(notes)
    assert all(key in told for key in ("exp_id", "port", "db_name", "col_name", "load_exp"))
    assert "IR runs first, for 10 epochs" in told
    assert "kmeans_k" not in told


def test_every_value_is_laid_over(write):
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


def test_it_is_laid_over_the_named_recipe(write):
    config, _ = convert_pretrain_json(
        write({"x": {"init_lr": 0.1}}) + ":x", recipe("vggnet_LA").config
    )
    assert config == override(
        recipe("vggnet_LA").config, learning_rate=0.1, sized_for=config.sized_for
    )


def test_comments_are_left_out_and_odd_keys_are_named(write):
    text = '// made by hand\n{"x": {\n  // slow\n  "task": "LA", "kmeans_kk": "5", "gpu": "0"}}'
    _, notes = convert_pretrain_json(write(text) + ":x")
    assert "kmeans_kk is not an option of the reference" in notes[0]
    assert "Did you mean 'kmeans_k'" in notes[0]
    assert notes[1].startswith("gpu means nothing here")


def test_steps_that_are_no_whole_epochs_are_told(write):
    config, notes = convert_pretrain_json(write({"train_num_steps": 10_010, "task": "IR"}))
    assert config.epochs == 2
    assert "no whole number of epochs" in notes[0]


def test_readouts_are_our_recipes(write):
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
        assert any("port means nothing" in note for note in notes)


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (None, "", "cannot be read"),
        ("{", "", "is not JSON"),
        ("[1]", "", "does not hold named values"),
        ({"res18_LA": {}}, ":res81_LA", "Did you mean 'res18_LA'"),
        ({"res18_LA": {}}, "", "name one of its configurations"),
        ({"batch_size": "many"}, "", "a value cannot be what it is"),
        ({"batch_size": 0}, "", "a value cannot be what it is"),
        ({"kmeans_k": [3]}, "", "a value cannot be what it is"),
        ({"model_type": "resnet34"}, "", "model_type"),
        ({"data_len": 10}, "", "less than batch_size"),
        ({"lr_boundaries": "1;2"}, "", "a value cannot be what it is"),
        ({"init_lr": -1}, "", "--learning-rate"),
        ({"get_all_layers": "1"}, "", "localagg transfer RUN"),
    ],
)
def test_wrong_files_are_refused_in_one_sentence(write, text, name, message):
    path = "/no/such/file.json" if text is None else write(text)
    with pytest.raises(UserError) as caught:
        convert_pretrain_json(path + name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_readout_files_are_refused_likewise(write):
    with pytest.raises(UserError, match="a value cannot be"):
        convert_readout_json(write({"train_crop": "weird"}))


def test_a_section_is_found_by_name(write):
    path = write({"a": {"task": "IR"}, "b": {"task": "LA"}})
    assert read_json(f"{path}:b") == ("b", {"task": "LA"})
