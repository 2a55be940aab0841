"""Programs of neuroscience hook modules by their dotted name: each layer is a module's output."""

import functools

import pytest
import torch
from torchvision.models.feature_extraction import create_feature_extractor

from localagg.models import create_encoder

NETWORKS = [
    ("preact_resnet18", 32, {}),
    ("preact_resnet50", 33, {}),
    ("resnet18_vvs", 75, {}),
    ("resnet50_vvs", 33, {}),
    ("resnet18_small", 16, {"width": 8}),
    ("resnet18", 64, {}),
    pytest.param(("alexnet_bn", 195, {}), marks=pytest.mark.slow),
    pytest.param(("vgg16_bn_last", 224, {}), marks=pytest.mark.slow),
    ("timm:resnet18", 64, {}),
    ("timm:tf_efficientnet_lite0", 64, {}),
    ("timm:convnext_atto", 64, {}),
]


@pytest.fixture(scope="module", params=NETWORKS, ids=str)
def encoder_and_images(request):
    model, side, options = request.param
    if model.startswith("timm:"):
        pytest.importorskip("timm")
    images = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8)
    return create_encoder(model, 8, seed=0, **options).eval(), images


@torch.no_grad()
def test_a_forward_hook_on_each_module_gets_the_layers_map(encoder_and_images):
    encoder, images = encoder_and_images
    hooked = {}
    for layer, name in encoder.layer_modules.items():
        encoder.get_submodule(name).register_forward_hook(
            lambda _, __, output, layer=layer: hooked.setdefault(layer, output)
        )
    encoder(images)
    maps = encoder.maps(images)
    assert list(maps) == list(hooked) == encoder.layers
    for layer, map_ in maps.items():
        assert map_.ndim == 4
        assert torch.equal(hooked[layer], map_), layer


def leaves(encoder):
    """Return what timm cannot trace, as the documentation of layers says."""
    if not encoder.spec["model"].startswith("timm:tf_"):
        return None
    from timm.models import get_notrace_functions, get_notrace_modules

    return {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}


@torch.no_grad()
def test_torchvisions_extractor_takes_every_module(encoder_and_images):
    encoder, images = encoder_and_images
    extract = functools.partial(create_feature_extractor, tracer_kwargs=leaves(encoder))
    names = {module: layer for layer, module in encoder.layer_modules.items()}
    found = extract(encoder, names)(images)
    for layer, map_ in encoder.maps(images).items():
        assert torch.equal(found[layer], map_), layer
    whole = extract(encoder, {"head": "head"})(images)["head"]
    assert torch.equal(whole, encoder.unnormalized(images))
    pixels = (images / 255 - encoder.mean) / encoder.std
    within = {module.removeprefix("backbone."): layer for module, layer in names.items()}
    last = encoder.layers[-1]
    found = extract(encoder.backbone, within)(pixels)
    assert torch.equal(found[last], encoder.maps(images, [last])[last])


@torch.no_grad()
def test_a_transformers_blocks_return_the_tokens_of_its_maps():
    pytest.importorskip("timm")
    encoder = create_encoder("timm:vit_tiny_patch16_224", 8, seed=0, img_size=32, depth=2).eval()
    images, tokens = torch.rand(1, 3, 32, 32), []
    block = encoder.get_submodule(encoder.layer_modules["1"])
    block.register_forward_hook(lambda _, __, output: tokens.append(output))
    map_ = encoder.maps(images, [1])["1"]
    assert torch.equal(tokens[0][:, 1:].transpose(1, 2).reshape(map_.shape), map_)
