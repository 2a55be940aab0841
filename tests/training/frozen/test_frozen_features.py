"""The cache of frozen features: what it holds, when it is computed again, what a kill leaves."""

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from expect import user_error

from localagg import checkpoint
from localagg.config import PretrainConfig, override
from localagg.data.images.augment import Augment
from localagg.data.loading.cropping import evaluation_crops, training_crops
from localagg.data.loading.loader import Feed
from localagg.data.sources.open import open_images
from localagg.models import create_encoder
from localagg.recipes.builtin import recipe
from localagg.recipes.derived_settings import resolve_defaults
from localagg.training.frozen import frozen_features as module
from localagg.training.frozen.frozen_features import frozen_features

NETWORK = {"model": "resnet18_small", "width": 8, "blocks": (1, 1)}


@dataclass
class Case:
    """A folder of images, a network, and a cache of its own."""

    data: str
    cache: str
    options: dict = field(default_factory=dict)

    def config(self) -> PretrainConfig:
        config = override(
            recipe("adapt").config, **NETWORK, dim=8, image_size=24, feature_views=2, workers=0,
            cache=self.cache, batch_size=8, **self.options,
        )  # fmt: skip
        return resolve_defaults(config, 48, 48)

    def feed(self) -> Feed:
        return Feed(
            open_images(self.data), self.config().views, batch_size=8, memory="never",
            unreadable=self.config().unreadable,
        )  # fmt: skip

    def compute(self, encoder=None):
        return frozen_features(encoder or network(), self.config(), self.feed())


def network(seed: int = 0):
    encoder = create_encoder(NETWORK["model"], 8, seed=seed, width=8, blocks=(1, 1))
    for norm in encoder.backbone.modules():  # statistics that folding must not lose
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_(generator=torch.Generator().manual_seed(seed))
            norm.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(seed))
    return encoder.eval()


@pytest.fixture
def case(tmp_path, pictures):
    data = tmp_path / "data"
    shutil.copytree(pictures / "train", data)
    return Case(str(data), str(tmp_path / "cache"))


@pytest.fixture
def computed(monkeypatch):
    """Sizes of the chunks that are computed."""
    sizes, from_crops = [], module._Extractor.from_crops

    def count(self, crops):
        sizes.append(len(crops[0].index))
        return from_crops(self, crops)

    monkeypatch.setattr(module._Extractor, "from_crops", count)
    return sizes


def test_features_are_those_of_the_training_views_and_of_the_measured_view(case):
    found, encoder, config = case.compute(), network(), case.config()
    source, index = open_images(case.data), torch.arange(48)
    views = [evaluation_crops(source, config.views, False, index)[0].images / 255]
    for epoch in (0, 1):  # view n is the view of epoch n of a run on images
        crops = training_crops(source, config.views, config.seed, epoch, index)[0].images
        views.append(Augment(config.views, config.seed, cropped=True)(crops, epoch, index))
    with torch.no_grad():
        expected = torch.stack([encoder.double().pooled(v.double()) for v in views], dim=1)
    assert found.values.dtype == np.float16
    torch.testing.assert_close(
        torch.from_numpy(found.values.astype("float64")), expected, rtol=2e-3, atol=2e-3
    )
    torch.testing.assert_close(found.measured(index), torch.from_numpy(found.values[:, 0]).float())


def test_each_epoch_draws_a_view_of_each_image(case):
    found, index = case.compute(), torch.arange(48)
    rows = torch.stack([found.random(epoch, index) for epoch in range(20)], dim=1)
    views = torch.from_numpy(found.values[:, 1:]).float()
    first = (rows == views[:, :1]).all(dim=2)
    assert ((rows == views[:, 1:]).all(dim=2) | first).all()
    assert 0.4 < first.float().mean() < 0.6
    assert (found.random(3, index[[5, 2]]) == rows[[5, 2], 3]).all()  # of any batch


def test_no_feature_is_computed_twice_and_none_is_stale(case, computed):
    case.compute()
    assert sum(computed) == 48
    head = network()
    torch.nn.init.zeros_(head.head.weight)
    case.compute(head)  # features do not depend on the head
    assert sum(computed) == 48
    case.compute(network(seed=1))
    assert sum(computed) == 2 * 48
    for options in ({"seed": 1}, {"gray": 0.0}, {"feature_views": 3}, {"image_size": 20}):
        changed = Case(case.data, case.cache, options)
        changed.config = lambda c=changed: override(Case(c.data, c.cache).config(), **c.options)
        changed.compute()
    assert sum(computed) == 6 * 48
    photo = sorted(Path(case.data).rglob("*.jpg"))[7]
    photo.write_bytes(photo.read_bytes() + b"\0")
    case.compute()
    assert sum(computed) == 7 * 48


def test_a_computation_that_was_stopped_continues_after_its_last_mark(case, computed, monkeypatch):
    whole = Case(case.data, case.cache + "-whole").compute().values
    computed.clear()
    monkeypatch.setattr(module, "_SAVE_SECONDS", 0.0)
    count = module._Extractor.from_crops

    def fail(self, crops):
        if len(computed) == 2:
            raise MemoryError
        return count(self, crops)

    monkeypatch.setattr(module._Extractor, "from_crops", fail)
    with pytest.raises(MemoryError):
        case.compute()
    monkeypatch.setattr(module._Extractor, "from_crops", count)
    assert np.array_equal(case.compute().values, whole)
    assert computed == [16, 16, 16]
    assert [path.name[0] != "." for path in Path(case.cache).iterdir()] == [True]


def test_a_damaged_entry_is_computed_again(case, computed):
    values = np.array(case.compute().values)
    (entry,) = Path(case.cache).iterdir()
    (entry / "features.npy").write_bytes((entry / "features.npy").read_bytes()[:-10])
    assert np.array_equal(case.compute().values, values)
    assert sum(computed) == 2 * 48


@pytest.mark.parametrize("facts", ["{", "[]", '{"unreadable": 5}'])
def test_damaged_facts_and_marks_are_computed_again(case, computed, facts):
    values = np.array(case.compute().values)
    (entry,) = Path(case.cache).iterdir()
    (entry / "facts.json").write_text(facts)
    unfinished = entry.with_name(f".{entry.name}.tmp")
    shutil.copytree(entry, unfinished)
    (unfinished / "done-0.json").write_text(facts)
    assert np.array_equal(case.compute().values, values)
    assert sum(computed) == 2 * 48


def test_unreadable_images_are_excluded_or_named(case):
    (Path(case.data) / "temple/06.jpg").write_bytes(
        (Path(case.data) / "temple/06.jpg").read_bytes()[:700]
    )
    with user_error("unreadable-images", "temple/06.jpg"):
        case.compute()
    case.options["unreadable"] = "skip"
    feed = case.feed()
    found = frozen_features(network(), case.config(), feed)
    assert list(found.unreadable) == [30]
    assert 30 not in feed.valid
    assert not found.values[30].any()


def test_features_beyond_the_limit_are_refused_before_they_are_computed(case, computed):
    case.options["cache_gb"] = 2e-6
    with user_error("too-large", "--cache-gb", "48"):
        case.compute()
    assert not computed
    assert not Path(case.cache).exists()


KILLED = """
import sys, torch
sys.path[:0] = {path!r}
import test_frozen_features as tests
tests.module._SAVE_SECONDS = 0.0
from_crops = tests.module._Extractor.from_crops
def slow(self, crops):
    import time; time.sleep(0.2)
    return from_crops(self, crops)
tests.module._Extractor.from_crops = slow
print("ready", flush=True)
tests.Case({data!r}, {cache!r}).compute()
"""


@pytest.mark.slow
def test_kills_at_any_moment_leave_a_cache_that_continues(case):
    whole = Case(case.data, case.cache + "-whole").compute().values
    path = [str(Path(__file__).parent), *sys.path]
    script = KILLED.format(path=path, data=case.data, cache=case.cache)
    for seconds in (0.05, 0.3, 0.5):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(seconds)
        process.kill()
        process.wait()
    assert np.array_equal(case.compute().values, whole)


def test_weights_files_have_the_same_features(case, computed, tmp_path):
    checkpoint.save_weights(tmp_path / "weights.safetensors", network())
    case.compute()
    case.compute(checkpoint.load_encoder(tmp_path / "weights.safetensors"))
    assert sum(computed) == 48
