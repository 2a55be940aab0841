import json
import re
from pathlib import Path

import pytest
from expect import user_error

from localagg.config import override
from localagg.recipes.builtin import READOUT_RECIPES, recipe
from localagg.recipes.from_reference_json import (
    convert_pretrain_json,
    convert_readout_json,
    read_json,
)
from localagg.recipes.reference_keys import FURTHER_KEYS, PRETRAIN_KEYS, READOUT_KEYS

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
    config, notes = convert_pretrain_json(write({"other": LA}) + ":other")
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
    assert recipe("res18_IR").config.compat is None
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
    assert all(name in notes[0] for name in ("kmeans_kk", "'kmeans_k'"))
    assert "gpu" in notes[1]
    assert "--device" in notes[1]
    assert any("load_step" in note and "--start" in note for note in notes)
    assert any("train_num_steps" in note and "--epochs" in note for note in notes)


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
        ({"model_type": "resnet34"}, "", "option-invalid", "alexnet_bn_no_drop"),
        ({"task": "la"}, "", "option-invalid", "'la'; it is one of IR, LA"),
        ({"load_step": 2, "train_num_steps": 1}, "", "option-invalid", "load_step 2"),
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


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"train_crop": "weird"}, ("'weird'", "validate_crop")),
        ({"model_type": "resnet34"}, ("'resnet34'", "vggnet_fx")),
        ({"ten_crop": "no"}, ("'no'", "true, false")),
        ({"model_type": "vggnet_fx"}, ("get_all_layers", "vggnet_fx")),
        ({"load_step": 9, "train_num_steps": 9}, ("train_num_steps 9",)),
    ],
)
def test_an_invalid_readout_value_raises(write, values, named):
    with user_error("option-invalid", *named):
        convert_readout_json(write(values))


# (model_type, its steps of a read-out: loaded at, drops, end; its LA: boundaries, end, kmeans_k)
NETWORKS = {
    "alexnet": ("alexnet_bn_no_drop", 1601440, "2051845,2151935", 2252025, "1190000,1423100", 3),
    "vggnet": ("vggnet_fx", 890712, "1000900,1301170", 1401260, "680681,790791", 6),
    "res18": (None, 2001800, "2302070,2602340", 2702430, "1600000,1873411", 10),
    "res50": ("resnet50", 2001800, "2302070,2602340", 2702430, "1522000,1895857", 10),
}
LAYERS = {"alexnet": "conv1,conv2,conv3,conv4,conv5", "vggnet": "0,1,2,3,4"}
LAYERS |= {"res18": "1,3,5,7,9", "res50": "1,4,8,14,17"}


@pytest.mark.parametrize("network", NETWORKS)
def test_copies_of_the_sixteen_under_other_names_resolve_alike(write, network):
    model, loaded, drops, end, la_drops, clusterings = NETWORKS[network]
    shared = {"port": 1} | ({} if model is None else {"model_type": model})
    vgg = network == "vggnet"
    la = shared | {
        "load_step": 100090, "lr_boundaries": la_drops, "train_num_steps": loaded,
        "kmeans_k": ",".join(["10000" if vgg else "30000"] * clusterings),
    } | ({"batch_size": 256} if vgg else {})  # fmt: skip
    ir = shared | {"task": "IR", "train_num_steps": 100090}
    readout = shared | {
        "ten_crop": True, "get_all_layers": LAYERS[network], "load_step": loaded,
        "lr_boundaries": drops, "train_num_steps": end,
    }  # fmt: skip
    plain = {"train_crop": "alexnet_crop_flip"}
    if network == "alexnet":
        readout |= plain | {"weight_decay": 0}
    copy = write({"ir": ir, "la": la, "t": readout, "p": readout | plain | {"num_classes": 205}})
    assert convert_pretrain_json(f"{copy}:ir")[0] == recipe(f"{network}_IR").config
    assert convert_pretrain_json(f"{copy}:la")[0] == recipe(f"{network}_LA").config
    for name, prefix in (("t", ""), ("p", "plc_")):
        due = READOUT_RECIPES[f"{prefix}trans_{network}_LA"].config
        assert convert_readout_json(f"{copy}:{name}")[0] == due


def test_a_missing_key_has_the_references_default_whatever_the_name(write):
    """Spelled out or missing, under a recipe's name or another: one configuration."""
    for convert, keys, more in (
        (convert_pretrain_json, PRETRAIN_KEYS, {}),
        (convert_readout_json, READOUT_KEYS, {"load_step": 5}),
    ):
        spelled = {key: of.default for key, of in keys.items() if of.default is not None} | more
        due = convert(write({"x": spelled}) + ":x")[0]
        for name in ("x", "res18_LA", "vggnet_LA", "trans_alexnet_LA"):
            assert convert(write({name: more}) + f":{name}")[0] == due
        for key in spelled.keys() - more.keys():
            rest = {k: v for k, v in spelled.items() if k != key}
            assert convert(write({"x": rest}) + ":x")[0] == due, key
    config = convert_pretrain_json(write({"x": {}}) + ":x")[0]
    assert (config.ir_epochs, config.objective.clusters, config.drops) == (0, (10_000,), ())
    assert (config.batch_size, config.encoder.model) == (128, "preact_resnet18")
    config = convert_readout_json(write({"x": {}}) + ":x")[0]
    assert (config.ten_crop, config.drops, config.layers) == (False, (), ("9",))
    assert config.epochs == 2000


def test_every_key_acts_or_is_named(write):
    """A changed value changes the configuration, or a note says why it does not."""
    other = {
        "batch_size": 64, "weight_decay": 0.5, "lr_boundaries": "20018", "init_lr": 0.5,
        "model_type": "vggnet_fx", "data_len": 128_000, "instance_t": 0.5, "instance_k": 8,
        "kmeans_k": "7", "train_num_steps": 200_180, "task": "IR", "load_step": 10_009,
        "ten_crop": True, "get_all_layers": "3", "train_crop": "validate_crop",
        "num_classes": 205, "instance_m": 0.25,
    }  # fmt: skip
    for convert, keys, base in (
        (convert_pretrain_json, PRETRAIN_KEYS | FURTHER_KEYS, {"train_num_steps": 2_001_800}),
        (convert_readout_json, READOUT_KEYS, {"get_all_layers": "1", "lr_boundaries": "10009"}),
    ):
        before, _ = convert(write({"x": base}) + ":x")
        for key, of in keys.items():
            config, notes = convert(write({"x": {**base, key: other.get(key, "1")}}) + ":x")
            if of.ours.startswith("ignored"):
                assert config == before, key
                assert any(note.startswith(f"{key} is ignored") for note in notes), key
            else:
                assert config != before, key


def test_a_configuration_is_found_by_name(write):
    path = write({"a": {"task": "IR"}, "b": {"task": "LA"}})
    assert read_json(f"{path}:b") == ("b", {"task": "LA"})


def test_the_page_lists_every_key_with_its_default():
    page = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text()
    rows = [line.strip("|").split(" | ") for line in page.splitlines() if line.count("|") == 5]
    listed = {key: row for row in rows for key in re.findall(r"`(\w+)`", row[0])}
    for where, keys in (("training", PRETRAIN_KEYS), ("read-outs", READOUT_KEYS)):
        for key, of in keys.items():
            _, place, default, ours = (cell.strip() for cell in listed[key])
            assert place in (where, "both"), key
            assert of.ours in ours.split(" · "), key
            shown = str(of.default).lower() if of.default is not None else "none"
            assert shown in default.lower().replace(",", "").split(" · "), key
    assert listed.keys() - {"key"} == PRETRAIN_KEYS.keys() | READOUT_KEYS.keys()
