"""Weights of torchvision, timm, other programs and runs, told apart by the names of tensors."""

import argparse
from dataclasses import asdict

import pytest
import torch
import torchvision
from efficientnet import MODEL, write_efficientnet
from expect import user_error
from safetensors.torch import load_file, save_file
from shared_data import shared_data
from torch import nn

from localagg import checkpoint
from localagg.config import ViewConfig
from localagg.data import open_images
from localagg.data.loading.cropping import evaluation_batches
from localagg.models import Normalization, create_encoder, load_weights

X = torch.rand(2, 3, 64, 64)


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(1)
    network = torchvision.models.resnet18()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # running statistics as of a trained network
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1)
    return network.eval()


def pooled_of(network):
    """Return the classifier's input, by torchvision's own code."""
    with torch.no_grad():
        return network.avgpool(nn.Sequential(*list(network.children())[:-2])(X)).flatten(1)


def with_prefix(prefix, tensors):
    return {prefix + name: value for name, value in tensors.items()}


def assert_loaded(model, source, resnet, matched=120):
    encoder = create_encoder(model, 8, seed=0).eval()
    head = encoder.head.weight.clone()
    report = load_weights(encoder, source)
    assert len(report.matched) == matched
    assert report.missing == ("head.weight", "head.bias")
    assert torch.equal(encoder.head.weight, head)
    with torch.no_grad():
        torch.testing.assert_close(encoder.backbone.pooled(X), pooled_of(resnet))
    return report


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "model.encoder_q.", "net.0.body."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_prefixes_and_classifiers_do_not_matter(tmp_path, resnet, prefix, suffix):
    file = tmp_path / f"weights{suffix}"
    tensors = with_prefix(prefix, resnet.state_dict()) | {"other.bias": torch.ones(3)}
    if suffix == ".pth":
        settings = argparse.Namespace(arch="resnet18")
        torch.save({"epoch": 3, "args": settings, "state_dict": tensors}, file)
    else:
        save_file(tensors, file)
    models = ["resnet18", "timm:resnet18"] if prefix == "" else ["resnet18"]
    for model in models:
        report = assert_loaded(model, file, resnet)
        assert {*report.unused} == {f"{prefix}fc.weight", f"{prefix}fc.bias", "other.bias"}
        assert "120" in report.describe(file)


def test_a_list_of_children_and_files_without_counters_are_matched(tmp_path, resnet):
    body = nn.Sequential(*list(resnet.children())[:-1]).state_dict()
    torch.save({"model": {"student": with_prefix("0.", body)}}, tmp_path / "weights.pt")
    assert_loaded("resnet18", tmp_path / "weights.pt", resnet)
    plain = {k: v.half() for k, v in resnet.state_dict().items() if "tracked" not in k}
    save_file(plain, tmp_path / "half.safetensors")
    encoder = create_encoder("resnet18")
    report = load_weights(encoder, tmp_path / "half.safetensors")
    assert (len(report.matched), report.missing) == (100, ("head.weight", "head.bias"))
    assert encoder.backbone.stem[0].weight.dtype == torch.float32


def test_of_two_encoders_in_a_file_the_query_encoder_is_loaded(tmp_path, resnet):
    other = {name: value + 1 for name, value in resnet.state_dict().items()}
    both = with_prefix("encoder_q.", resnet.state_dict()) | with_prefix("encoder_k.", other)
    torch.save(both, tmp_path / "moco.pth.tar")
    report = assert_loaded("resnet18", tmp_path / "moco.pth.tar", resnet)
    assert len(report.unused) == 2 + 122


def test_weights_of_localagg_bring_head_and_normalization(tmp_path):
    options = {"width": 8, "blocks": (1, 1)}
    learned = create_encoder("resnet18_small", 6, seed=3, **options)
    learned.mean.fill_(0.25)
    files = [tmp_path / "own.safetensors", tmp_path / "own.pth", tmp_path / "wrapped.pth"]
    checkpoint.save_weights(files[0], learned)
    torch.save(learned.state_dict(), files[1])
    torch.save(with_prefix("module.", learned.state_dict()), files[2])
    run = tmp_path / "run"
    (run / "checkpoints" / "step-000000007").mkdir(parents=True)
    checkpoint.save_weights(run / "checkpoints/step-000000007/model.safetensors", learned)
    for source in (*files, run, str(run)):
        encoder = create_encoder("resnet18_small", 6, seed=0, **options)
        report = load_weights(encoder, source)
        assert report.missing == report.unused == ()
        for name, value in learned.state_dict().items():
            assert torch.equal(encoder.state_dict()[name], value), name
        assert encoder.normalization.mean == (0.25,) * 3
    for other in ({"dim": 5}, {"head_layers": 2, "dim": 6}):  # its head would not fit
        encoder = create_encoder("resnet18_small", seed=0, **other, **options)
        report = load_weights(encoder, files[0])
        assert {"head.weight", "head.bias"} <= {*report.missing}
        assert {*report.unused} == {"head.weight", "head.bias"}
        assert torch.equal(encoder.backbone.stem.weight, learned.backbone.stem.weight)


def test_weights_that_do_not_fit_are_named_and_change_nothing(tmp_path, resnet):
    encoder = create_encoder("resnet18", seed=0)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}

    def save(name, tensors):
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    wide = resnet.state_dict() | {"layer4.1.conv2.weight": torch.zeros(9, 512, 3, 3)}
    with user_error("mismatch", "layer4.1.conv2.weight", "(9, 512, 3, 3)", "(512, 512, 3, 3)"):
        load_weights(encoder, save("wide.safetensors", wide))
    small = create_encoder("resnet18_small", width=8).state_dict()
    with user_error("mismatch", "resnet18", "'backbone.", "'conv1.weight'"):
        load_weights(encoder, save("small.safetensors", small))
    larger = torchvision.models.resnet34().state_dict()
    with user_error("mismatch", "resnet18", "80", "layer1.2."):
        load_weights(encoder, save("larger.safetensors", larger))
    with user_error("mismatch", "resnet34", "100 of 180", "layer1.2."):
        load_weights(create_encoder("resnet34"), save("smaller.safetensors", resnet.state_dict()))
    nan = resnet.state_dict() | {"layer1.0.bn1.bias": torch.full((64,), torch.nan)}
    with user_error("not-finite", "layer1.0.bn1.bias"):
        load_weights(encoder, save("nan.safetensors", nan))
    integers = resnet.state_dict() | {"bn1.bias": torch.zeros(64, dtype=torch.int8)}
    with user_error("unsupported", "bn1.bias", "int8"):
        load_weights(encoder, save("integers.safetensors", integers))
    with user_error("not-found", tmp_path):
        load_weights(encoder, tmp_path)
    with user_error("not-found", "nothing.pth"):
        load_weights(encoder, tmp_path / "nothing.pth")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "nan.safetensors").read_bytes()[:999])
    with user_error("damaged", "cut.safetensors"):
        load_weights(encoder, tmp_path / "cut.safetensors")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with user_error("unsupported", "empty.pth"):
        load_weights(encoder, tmp_path / "empty.pth")
    torch.save({"state_dict": nn.Linear(2, 2)}, tmp_path / "object.pth")
    with user_error("unsupported", "object.pth", "Linear"):
        load_weights(encoder, tmp_path / "object.pth")
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name])


def test_missing_tensors_are_reported(tmp_path, resnet):
    tensors = resnet.state_dict()
    del tensors["layer4.1.bn2.bias"]
    save_file(tensors, tmp_path / "most.safetensors")
    report = load_weights(create_encoder("resnet18"), tmp_path / "most.safetensors")
    assert report.missing[0] == "backbone.stages.3.1.bn2.bias"
    assert "stages.3.1.bn2.bias" in report.describe("most")


def test_pretrained_weights_come_from_the_librarys_cache(tmp_path, monkeypatch, resnet):
    """The file stands in torch's cache under the name of torchvision's address."""
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(resnet.state_dict(), cache / weights.url.rpartition("/")[2])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert_loaded("resnet18", "pretrained", resnet)
    with user_error("unsupported", "--weights"):
        load_weights(create_encoder("resnet18_small", width=8), "pretrained")


def test_pretrained_weights_without_network_name_the_way_out(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with user_error("not-found", "resnet50", "no network", "--weights FILE"):
        load_weights(create_encoder("resnet50"), "pretrained")
    timm = pytest.importorskip("timm")
    encoder = create_encoder("timm:resnet18")
    monkeypatch.setattr(timm, "create_model", offline)
    with user_error("not-found", "timm:resnet18", "no network", "--weights FILE"):
        load_weights(encoder, "pretrained")


def test_timms_normalization_belongs_to_the_encoder_and_its_file(tmp_path):
    pytest.importorskip("timm")
    encoder = create_encoder(MODEL, 8).eval()
    half = (0.5, 0.5, 0.5)
    assert encoder.normalization == Normalization(half, half, "bicubic", 224)
    assert create_encoder("resnet18_small", width=8).normalization == Normalization()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = encoder.backbone.pooled(images * 2 - 1)
        torch.testing.assert_close(encoder.pooled(images), expected)
    encoder.mean.fill_(0.25)  # as an earlier version wrote the file
    checkpoint.save_weights(tmp_path / "weights.safetensors", encoder)
    again = checkpoint.load_encoder(tmp_path / "weights.safetensors")
    assert again.normalization == Normalization((0.25,) * 3, half, "bicubic", 224)
    assert asdict(again.normalization)["mean"] == (0.25,) * 3


@pytest.mark.slow
@torch.no_grad()
def test_real_weights_recognize_photos(tmp_path):
    """ImageNet's classes of the samples, by the encoder and the file's own classifier."""
    file = write_efficientnet(tmp_path)
    source = open_images(shared_data("imagenet-samples"))
    from timm.data import ImageNetInfo

    encoder = create_encoder(MODEL, 8, seed=0).eval()
    report = load_weights(encoder, file)
    assert (len(report.matched), report.unused) == (294, ("classifier.bias", "classifier.weight"))
    classifier, info, right = load_file(file), ImageNetInfo(), 0
    views = ViewConfig(image_size=224, eval_crop=0.875)
    index, images = next(evaluation_batches(source, views, batch=30))
    scores = encoder.pooled(images) @ classifier["classifier.weight"].T
    for i, label in zip(
        index.tolist(), (scores + classifier["classifier.bias"]).argmax(1), strict=True
    ):
        right += source.name(i).startswith(info.index_to_label_name(int(label)))
    assert right > 0.7 * len(index)
