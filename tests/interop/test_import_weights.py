"""A checkpoint of the reference becomes a weights file that the commands take."""

import json

import numpy as np
import pytest
import torch
from make_tf_checkpoint import checkpoint
from safetensors.torch import load_file

from localagg import cli
from localagg.checkpoint import load_encoder, load_views
from localagg.data import open_images
from localagg.data.loading.cropping import evaluation_batches
from localagg.interop.import_weights import PORT_VIEWS, REFERENCE_VIEWS
from localagg.interop.variable_names import map_variables
from localagg.models import create_encoder


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(prefix of a checkpoint of a ResNet-18 with its bank, the encoder, the bank's rows)."""
    folder = tmp_path_factory.mktemp("tf")
    encoder = create_encoder("preact_resnet18", seed=3)
    values = encoder.state_dict()
    arrays = {}
    for name, key in map_variables(encoder).items():
        tensor = values[key]
        tensor = tensor.permute(2, 3, 1, 0) if tensor.ndim == 4 else tensor.t()
        arrays[name] = tensor.contiguous().numpy()
    rows = np.random.RandomState(0).rand(5, 128).astype(np.float32)
    arrays["instance/memory_bank"] = rows
    arrays["instance/all_labels"] = np.arange(5)
    arrays["instance/cluster_labels"] = np.arange(10).reshape(2, 5)
    arrays["global_step"] = np.array(11)
    draw = np.random.RandomState(1)
    for layer, size in (("5", 28 * 28 * 128), ("9", 7 * 7 * 512)):
        name = f"instance/transfer_dense_{layer}"
        arrays[f"{name}/kernel"] = draw.randn(size, 2).astype(np.float32)
        arrays[f"{name}/bias"] = draw.randn(2).astype(np.float32)
    for name, data in checkpoint(arrays).items():
        (folder / name).write_bytes(data)
    return folder / "model.ckpt-10", encoder, rows


def test_weights_bank_and_views_are_written(stored, tmp_path, pictures, capsys):
    prefix, encoder, rows = stored
    out, bank = tmp_path / "la.safetensors", tmp_path / "bank.safetensors"
    words = ["import-tf", str(prefix), "--model", "preact_resnet18", "--out", str(out)]
    assert cli.main([*words, "--bank", str(bank), "--json", str(tmp_path / "r.json")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["global_step"], report["rows"], report["missing"]) == (11, 5, [])
    assert "preact_resnet18" in capsys.readouterr().out
    again = load_encoder(out)
    assert again.spec["model"] == "preact_resnet18"
    before, after = encoder.state_dict(), again.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert load_views(out) == REFERENCE_VIEWS
    written = load_file(bank)
    np.testing.assert_array_equal(written["rows"], rows)
    assert written["labels"].tolist() == list(range(5))
    assert written["clusters"].tolist() == np.arange(10).reshape(2, 5).tolist()
    assert {file.name for file in tmp_path.iterdir()} == {out.name, bank.name, "r.json"}
    table = tmp_path / "e.parquet"
    assert cli.main(["embed", str(out), "--data", str(pictures / "val"), "--out", str(table)]) == 0


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("{prefix} --model preact_resnet50 --out {new}", "preact_resnet50"),
        ("{prefix} --model preact_resnet81 --out {new}", "'preact_resnet18'"),
        ("{prefix} --model resnet18 --out {new}", "'resnet18'"),
        ("{prefix} --model preact_resnet18 --out /no/such/folder/x", "--out"),
        ("{prefix} --model preact_resnet18 --out {new} --bank /no/such/x", "--bank"),
        ("/no/such/model.ckpt-1 --model preact_resnet18 --out {new}", "/no/such/model.ckpt-1"),
        ("/no/such/checkpoint.pth.tar --model resnet18 --out {new}", "/no/such/checkpoint.pth.tar"),
        ("{prefix} --out {new}", "--model"),
    ],
)
def test_wrong_use_is_reported(stored, tmp_path, capsys, words, value):
    new = tmp_path / "new.safetensors"
    assert cli.main(["import-tf", *words.format(prefix=stored[0], new=new).split()]) == 2
    assert value in " ".join(capsys.readouterr().err.split())
    assert not new.exists()


def test_a_file_of_the_port_is_imported(tmp_path, capsys):
    import torchvision

    theirs = torchvision.models.resnet18()
    theirs.fc = torch.nn.Linear(512, 128)
    state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    file = tmp_path / "checkpoint.pth.tar"
    torch.save({"model_state_dict": state, "memory_bank": torch.rand(4, 128)}, file)
    out, bank = tmp_path / "w.safetensors", tmp_path / "b.safetensors"
    words = ["import-tf", str(file), "--model", "resnet18", "--out", str(out), "--bank", str(bank)]
    assert cli.main(words) == 0
    assert load_views(out) == PORT_VIEWS != REFERENCE_VIEWS
    head = load_encoder(out).head.weight
    assert torch.equal(head, theirs.fc.weight)
    assert load_file(bank)["rows"].shape == (4, 128)


def test_read_out_heads_are_imported_and_measured(stored, tmp_path, pictures, capsys):
    prefix, encoder, _ = stored
    out, heads, result = (tmp_path / name for name in ("w.safetensors", "h.safetensors", "r.json"))
    words = ["import-tf", str(prefix), "--model", "preact_resnet18", "--out", str(out)]
    assert cli.main([*words, "--heads", str(heads)]) == 0
    found = load_file(heads)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "5.weight": (2, 100352), "5.bias": (2,), "9.weight": (2, 25088), "9.bias": (2,),
    }  # fmt: skip
    words = ["transfer", str(out), "--data", str(pictures), "--json", str(result), "--workers", "0"]
    assert cli.main([*words, "--no-ten-crop", "--heads", str(heads)]) == 0
    measured = json.loads(result.read_text())
    assert (measured["epochs"], measured["steps"], measured["measured"]) == (0, 0, 12)
    source = open_images(str(pictures), "val")
    (index, images), *_ = evaluation_batches(source, REFERENCE_VIEWS, batch=12, workers=0)
    features = encoder.eval().features(images, layers=["5", "9"])
    for layer in ("5", "9"):
        logits = features[layer] @ found[f"{layer}.weight"].T + found[f"{layer}.bias"]
        right = (logits.argmax(1) == source.labels[index]).double().mean().item()
        assert measured["layers"][layer]["top1"] == pytest.approx(right)
    capsys.readouterr()
    for more, value in (
        (["--layers", "9", "7"], "7.weight"),
        (["--image-size", "64"], "5.weight"),
        (["--epochs", "3"], "--epochs"),
        (["--heads", str(out)], "import-tf --heads"),
    ):
        assert cli.main([*words, "--out", str(tmp_path / "x"), "--heads", str(heads), *more]) == 2
        assert value in " ".join(capsys.readouterr().err.split())
    assert cli.main(["transfer", str(out), "--data", str(pictures), "--heads", "/no/file"]) == 2
