"""Each format is loaded by the other program itself, and gives our numbers on real images."""

import inspect
import json
import socket

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from expect import user_error
from safetensors.torch import load_file
from shared_data import shared_data

import localagg
from embeddings import hidden_files
from localagg.checkpoint import save_weights
from localagg.cli.main import main
from localagg.config import ViewConfig
from localagg.interop import hub_folder
from localagg.interop.export import EXPORT_FORMATS, export
from localagg.interop.export_formats import OPSET
from localagg.models import create_encoder

VIEWS = ViewConfig(image_size=32, eval_crop=0.875)


def save_random(path, model, **options):
    """Write a network whose batch-norm statistics are not those of the start."""
    encoder = create_encoder(model, dim=12, seed=0, **options)
    torch.manual_seed(1)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    save_weights(path, encoder, VIEWS)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    save_random(folder / "resnet18.safetensors", "resnet18")
    save_random(folder / "small.safetensors", "resnet18_small", width=8, blocks=(1,))
    return folder


@pytest.fixture(scope="module")
def resnet(folder):
    return folder / "resnet18.safetensors"


@pytest.fixture(scope="module")
def small(folder):
    return folder / "small.safetensors"


def normalized(views: torch.Tensor) -> torch.Tensor:
    return TF.normalize(views / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def views_and_features(weights, pictures):
    """uint8 views of photographs, and the features and embeddings of the network itself."""
    model = localagg.load(weights, device="cpu")
    views = model.preprocess(sorted((pictures / "val").rglob("*.jpg")))
    with torch.no_grad():
        return views, model.encoder.pooled(views).numpy(), model.encoder(views).numpy()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torchvision_loads_the_weights(resnet, pictures, tmp_path, suffix):
    out = tmp_path / f"weights{suffix}"
    result = export(resnet, "torchvision", out, data=str(pictures))
    assert (result["compared"], result["images"], result["of"]) == ("features", 16, str(pictures))
    assert result["worst_difference"] <= 1e-5
    state = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    network = torchvision.models.resnet18()
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    network.fc = torch.nn.Identity()
    views, features, _ = views_and_features(resnet, pictures)
    with torch.no_grad():
        found = network.eval()(normalized(views)).numpy()
    np.testing.assert_allclose(found, features, atol=1e-5)


def test_timm_loads_the_folder(resnet, pictures, tmp_path):
    result = export(resnet, "timm", tmp_path / "timm")
    assert result["worst_difference"] <= 1e-5
    if "safetensors" not in inspect.getsource(torch.load):
        pytest.skip("timm loads by torch.load, which takes no safetensors in this version")
    network = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    transform = timm.data.resolve_model_data_config(network)
    assert (tuple(transform["input_size"]), transform["crop_pct"]) == ((3, 32, 32), 0.875)
    assert tuple(transform["mean"]) == (0.485, 0.456, 0.406)
    views, features, _ = views_and_features(resnet, pictures)
    with torch.no_grad():
        found = network(normalized(views)).numpy()
    np.testing.assert_allclose(found, features, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_onnxruntime_runs_the_graph_for_any_batch(small, pictures, tmp_path, normalize):
    out = tmp_path / "graph.onnx"
    result = export(small, "onnx", out, normalize=normalize)
    assert (result["opset"], result["compared"]) == (OPSET, "embedding")
    session = onnxruntime.InferenceSession(out)
    views, _, rows = views_and_features(small, pictures)
    inputs = views.numpy() if normalize else normalized(views).numpy()
    assert session.get_inputs()[0].shape[1:] == [3, 32, 32]
    for count in (1, 3, len(views)):
        (found,) = session.run(None, {"images": inputs[:count]})
        np.testing.assert_allclose(found, rows[:count], atol=1e-4)
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["image_size"] == "32"
    assert facts["normalized_by"] == ("graph" if normalize else "caller")


def test_torch_runs_the_program_for_any_batch(small, pictures, tmp_path):
    export(small, "torch", tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2").module()
    views, _, rows = views_and_features(small, pictures)
    for count in (1, len(views)):
        np.testing.assert_allclose(program(views[:count]).detach(), rows[:count], atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "small"])
def test_the_hub_s_folder_has_a_card_and_loads(folder, pictures, tmp_path, name):
    weights = folder / f"{name}.safetensors"
    export(weights, "hub", tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "license: " in card
    assert "FILL IN" in card
    expected = views_and_features(weights, pictures)[2]
    files = sorted((pictures / "val").rglob("*.jpg"))
    np.testing.assert_allclose(localagg.load(tmp_path / "hub").embed(files), expected, atol=1e-6)
    assert (tmp_path / "hub" / "config.json").exists() == (name == "resnet18")


def test_the_card_of_a_run_names_data_recipe_and_measurements(pictures, tmp_path):
    config = localagg.PretrainConfig(
        encoder=localagg.config.EncoderConfig(model="resnet18_small", width=8, blocks=(1,)),
        views=VIEWS, epochs=1, ir_epochs=1, batch_size=24, workers=0, device="cpu",
    )  # fmt: skip
    run = tmp_path / "run"
    localagg.pretrain(config, str(pictures), run)
    words = ["export", str(run), "--to", "hub", "--out", str(tmp_path / "hub")]
    assert main([*words, "--json", str(tmp_path / "j.json")]) == 0
    assert json.loads((tmp_path / "j.json").read_text())["of"] == str(pictures)
    card = (tmp_path / "hub" / "README.md").read_text()
    for text in ("48 images", pictures.name, "resnet18_small", "seed 0"):
        assert text in card


@pytest.mark.slow
def test_real_photos_round_trip(resnet, tmp_path):
    photos = shared_data("imagenet-samples")
    for to, kind in EXPORT_FORMATS.items():
        out = tmp_path / f"photos-{to}{kind.suffixes[0] if kind.suffixes else ''}"
        assert export(resnet, to, out, data=str(photos))["worst_difference"] <= kind.tolerance


def test_a_difference_leaves_nothing_behind(small, tmp_path, monkeypatch):
    """As of a converter that loses a weight."""
    kind = EXPORT_FORMATS["safetensors"]

    def changed(network, path, views):
        return kind.run(network, path, views) + 1e-3

    monkeypatch.setitem(EXPORT_FORMATS, "safetensors", kind._replace(run=changed))
    with user_error("mismatch", "0.001"):
        export(small, "safetensors", tmp_path / "w.safetensors")
    assert list(tmp_path.iterdir()) == hidden_files(tmp_path) == []


def test_what_cannot_be_exported_gives_one_sentence(small, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    out = str(tmp_path / "w")
    for to, path, code, values in (
        ("tflite", out, "option-unknown", ["tflite", "onnx"]),
        ("torchvision", out + ".pth", "unsupported", ["torchvision", "resnet18_small", "onnx"]),
        ("timm", out, "unsupported", ["timm", "resnet18_small"]),
        ("onnx", out + ".pt", "option-invalid", [".onnx"]),
        ("safetensors", out, "option-invalid", [".safetensors"]),
        ("hub", tmp_path / "there", "exists", [tmp_path / "there"]),
        ("onnx", tmp_path / "none" / "w.onnx", "not-found", ["none"]),
    ):
        with user_error(code, *values):
            export(small, to, path)
    with user_error("option-conflict", "--preprocessing", "timm"):
        export(small, "timm", out, normalize=False)
    with user_error("option-conflict", "--push", "timm"):
        export(small, "timm", out, push="me/birds")
    with user_error("option-invalid", "me/too/many"):
        export(small, "hub", out, push="me/too/many")
    with user_error("not-found", "nowhere"):
        export("nowhere", "hub", out)

    def fails(network, path):
        raise RuntimeError("no such operator")

    kind = EXPORT_FORMATS["onnx"]
    monkeypatch.setitem(EXPORT_FORMATS, "onnx", kind._replace(write=fails))
    with user_error("unsupported", "onnx", "no such operator"):
        export(small, "onnx", out + ".onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_folder_is_pushed_to_the_hub(small, tmp_path, monkeypatch):
    """A stand-in for the Hub's client: no test has a network."""
    pushed = {}

    class Api:
        def create_repo(self, name, exist_ok):
            return f"https://hub/{name}"

        def upload_folder(self, repo_id, folder_path):
            pushed[repo_id] = sorted(path.name for path in folder_path.iterdir())

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    result = export(small, "hub", tmp_path / "hub", push="me/birds")
    assert result["address"] == "https://hub/me/birds"
    assert pushed == {"me/birds": ["README.md", "localagg.safetensors"]}

    class TransportError(Exception):
        """As the Hub's client raises: neither an OSError nor a ValueError."""

    def offline(self, name, exist_ok):
        raise TransportError("no network")

    monkeypatch.setattr(Api, "create_repo", offline)
    with user_error("environment", "no network", tmp_path / "hub2"):
        export(small, "hub", tmp_path / "hub2", push="me/birds")
    assert (tmp_path / "hub2" / "README.md").exists()


def test_an_upload_to_a_silent_hub_ends(tmp_path, monkeypatch):
    """A server that takes the request and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", "token")
        monkeypatch.setattr(hub_folder, "_SILENT_SECONDS", 0.2)
        with user_error("environment", tmp_path, "me/birds"):
            hub_folder.push_to_hub(tmp_path, "me/birds")
