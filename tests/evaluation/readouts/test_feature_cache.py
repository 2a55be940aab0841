"""Cached features: the right values, never stale ones, within the budget, whole or absent."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from expect import user_error
from PIL import Image
from readouts import count_extracted, network

from localagg.config import ViewConfig
from localagg.data.images.augment import evaluation_view
from localagg.data.images.decode import decode
from localagg.data.sources.open import open_images
from localagg.engine.device import make_fabric
from localagg.evaluation.readouts import feature_cache as features
from localagg.evaluation.readouts.feature_cache import FeatureCache, FeatureExtractor, hash_images

VIEWS = ViewConfig(image_size=12, eval_crop=0.75, crop="center")


def extractor(layers=("0", "2"), *, views=VIEWS, encoder=None, precision="32-true", **options):
    fabric = make_fabric("cpu", precision)
    return FeatureExtractor(encoder or network(), layers, views, fabric, **options)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """100 digits as BMP, all of one size, more than a fingerprint looks into."""
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("drawn")
    for i, digit in enumerate(load_digits().images[:100]):
        Image.fromarray((digit * 15).astype(np.uint8)).resize((16, 20)).save(root / f"{i:03d}.bmp")
    return root


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    return count_extracted(monkeypatch)


def expected(source, layer, encoder=None, views=VIEWS):
    """Features as the encoder gives them, image by image, of rounded views as Pillow's."""
    images = torch.stack([decode(source[i].image) for i in range(len(source))])
    shown = evaluation_view(images, views)
    with torch.no_grad():
        return (encoder or network()).eval().features(shown, [layer])[layer]


def test_cached_values_are_the_encoders(tmp_path, drawn):
    source = open_images(drawn)
    pixels = torch.stack([decode(source[i].image) for i in range(len(source))])
    kept = FeatureCache(tmp_path, 1.0).get(extractor(), source, pixels=pixels)
    assert kept.index.tolist() == list(range(100))
    for layer in ("0", "2"):
        torch.testing.assert_close(
            kept.rows(layer, torch.tensor([7, 3, 99])),
            expected(source, layer)[[7, 3, 99]],
            rtol=1e-5,
            atol=1e-6,
        )
    sizes = [len(index) for index, _ in kept.batches(30)]
    assert sizes == [30, 30, 30, 10]


def test_bfloat16_is_cached_bit_exactly(tmp_path, drawn):
    source = open_images(drawn)
    mixed = extractor(("1",), precision="bf16-mixed")
    kept = FeatureCache(tmp_path, 1.0).get(mixed, source)
    rows = kept.rows("1", torch.arange(100))
    assert rows.dtype == torch.bfloat16
    from localagg.data.loading.cropping import evaluation_batches

    (batch,) = evaluation_batches(source, VIEWS)
    assert torch.equal(rows, mixed(batch.images)["1"])


def test_cached_features_are_not_computed_again(tmp_path, drawn, counted):
    source = open_images(drawn)
    first = FeatureCache(tmp_path, 1.0).get(extractor(), source)
    done = len(counted)
    again = FeatureCache(tmp_path, 1.0).get(extractor(("2",)), source)
    assert counted[done:] == [1]  # the blank image that tells the sizes
    assert np.array_equal(again.layers["2"], first.layers["2"])


@pytest.mark.parametrize(
    "change", ["weight", "image", "view", "size", "formulas", "layer", "precision", "compat"]
)
def test_any_change_makes_another_entry(tmp_path, drawn, counted, change):
    folder = tmp_path / "images"
    shutil.copytree(drawn, folder)
    cache = tmp_path / "cache"
    FeatureCache(cache, 1.0).get(extractor(("1",)), open_images(folder))
    before = {entry.name for entry in cache.iterdir()}
    encoder, views, layer, options = network(), VIEWS, "1", {}
    if change == "weight":
        with torch.no_grad():
            encoder.backbone.stem.weight[0, 0, 0, 0] += 0.5
    elif change == "image":
        old = open_images(folder).fingerprint()
        Image.open(folder / "098.bmp").rotate(180).save(folder / "002.bmp")
        assert open_images(folder).fingerprint() == old  # it looks into others
    elif change == "view":
        views = replace(VIEWS, eval_crop=0.7)
    elif change == "size":
        views = replace(VIEWS, image_size=14)
    elif change == "formulas":
        views = replace(VIEWS, augmentation="reference")
    elif change == "layer":
        layer = "2"
    elif change == "precision":
        options = {"precision": "bf16-mixed"}
    elif change == "compat":
        options = {"compat": "reference"}
    done = len(counted)
    changed = extractor((layer,), encoder=encoder, views=views, **options)
    kept = FeatureCache(cache, 1.0).get(changed, open_images(folder))
    assert sum(counted[done:]) == 101
    after = {entry.name for entry in cache.iterdir()}
    assert before < after
    assert len(after) == 2
    if change in ("weight", "image", "layer"):  # others need not show in the values
        source = open_images(folder)
        fresh = changed(next(iter(views_of(source))).images)[layer]
        assert torch.equal(kept.rows(layer, torch.arange(100)), fresh)


def views_of(source):
    from localagg.data.loading.cropping import evaluation_batches

    return evaluation_batches(source, VIEWS)


def test_pixels_in_memory_and_files_differ_only_where_they_are_resized(tmp_path, drawn):
    source = open_images(drawn)
    pixels = torch.stack([decode(source[i].image) for i in range(len(source))])
    shown = extractor(("0",))
    assert shown.facts("", pixels) != shown.facts("", None)
    square = pixels[:, :, :16]
    plain = extractor(("0",), views=ViewConfig(image_size=16, eval_crop=1.0))
    assert plain.facts("", square) == plain.facts("", None)


# --- Budget and damage ----------------------------------------------------------------------------


def test_the_least_recently_used_entries_are_replaced(tmp_path, drawn):
    source = open_images(drawn)
    one = extractor(("2",)).feature_bytes("2", 100) / 2**30
    tight = 2.5 * one
    assert FeatureCache(tmp_path, 0.9 * one).get(extractor(("2",)), source) is None
    assert not list(tmp_path.iterdir())
    encoders = [network(seed) for seed in range(4)]
    names = []
    for age, encoder in zip((300, 200), encoders[:2], strict=True):
        FeatureCache(tmp_path, tight).get(extractor(("2",), encoder=encoder), source)
        names.append(next(e.name for e in tmp_path.iterdir() if e.name not in names))
        moment = (tmp_path / names[-1]).stat().st_mtime - age
        os.utime(tmp_path / names[-1], (moment, moment))
    FeatureCache(tmp_path, tight).get(extractor(("2",), encoder=encoders[0]), source)  # used now
    same = FeatureCache(tmp_path, tight)
    assert same.get(extractor(("2",), encoder=encoders[2]), source) is not None
    assert names[0] in os.listdir(tmp_path)
    assert names[1] not in os.listdir(tmp_path)
    # What the same object has given out stays.
    assert same.get(extractor(("2",), encoder=encoders[3]), source) is not None
    assert names[0] not in os.listdir(tmp_path)
    assert same.get(extractor(("2",), encoder=encoders[1]), source) is None
    assert len(os.listdir(tmp_path)) == 2


def test_which_layers_fit(tmp_path):
    made = extractor(("0", "1", "2"))
    need = {layer: made.feature_bytes(layer, 100) for layer in made.layers}
    assert need["0"] == 100 * 8 * 12 * 12 * 4
    gb = (need["1"] + need["2"] + 1) / 2**30
    assert FeatureCache(tmp_path, gb).fitting_layers(made, 100) == ["1", "2"]
    assert FeatureCache(tmp_path, 0).fitting_layers(made, 100) == []


def test_other_files_in_the_folder_are_left_alone(tmp_path, drawn):
    (tmp_path / ("a" * 40)).mkdir()
    (tmp_path / ("a" * 40) / "thesis.tex").write_bytes(bytes(100_000))
    made = extractor(("2",))
    gb = (made.feature_bytes("2", 100) + 50_000) / 2**30
    assert FeatureCache(tmp_path, gb).get(made, open_images(drawn)) is None
    assert (tmp_path / ("a" * 40) / "thesis.tex").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "shape", "index", "pickle"])
def test_damaged_entries_are_computed_again(tmp_path, drawn, damage):
    source = open_images(drawn)
    whole = FeatureCache(tmp_path, 1.0).get(extractor(), source)
    values = whole.rows("2", torch.arange(100))
    (entry,) = [e for e in tmp_path.iterdir() if '"layer": "2"' in (e / "facts.json").read_text()]
    file = entry / "features.npy"
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "shape":
        np.save(file, np.zeros((99, values.shape[1]), np.float32))
    elif damage == "pickle":
        np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    else:
        file.write_bytes(content)
        np.save(entry / "index.npy", np.arange(50))
    again = FeatureCache(tmp_path, 1.0).get(extractor(), source)
    assert torch.equal(again.rows("2", torch.arange(100)), values)
    assert again.index.tolist() == list(range(100))


def test_a_stop_leaves_no_unfinished_entry(tmp_path, drawn, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(features, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path, 1.0).get(extractor(), open_images(drawn))
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    left = tmp_path / ".killed.tmp"  # by a kill, which cannot tidy up
    left.mkdir()
    assert FeatureCache(tmp_path, 1.0).get(extractor(("0",)), open_images(drawn)) is not None
    assert left.exists()
    os.utime(left, (0, 0))
    assert FeatureCache(tmp_path, 1.0).get(extractor(("1",)), open_images(drawn)) is not None
    assert not left.exists()


def test_entries_that_another_process_removes_are_reported(tmp_path, drawn, monkeypatch):
    original = features.rename_entry

    def put(beside, entry):
        original(beside, entry)
        shutil.rmtree(entry)

    monkeypatch.setattr(features, "rename_entry", put)
    with user_error("busy", tmp_path):
        FeatureCache(tmp_path, 1.0).get(extractor(("2",)), open_images(drawn))


def test_a_folder_that_cannot_be_written_is_named(tmp_path, drawn):
    (tmp_path / "file").write_bytes(b"")
    with user_error("environment", tmp_path / "file", "--cache"):
        FeatureCache(tmp_path / "file", 1.0).get(extractor(), open_images(drawn))


def test_a_full_disk_is_not_filled_further(tmp_path, drawn, monkeypatch):
    need = extractor(("2",)).feature_bytes("2", 100)
    for free, kept in ((2 * need - 2, False), (2 * need, True)):
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _, f=free: shutil._ntuple_diskusage(0, 0, f)
        )
        found = FeatureCache(tmp_path, 1.0).get(extractor(("2",)), open_images(drawn))
        assert (found is not None) == kept


def test_unreadable_images_have_no_features(tmp_path, drawn):
    folder = tmp_path / "images"
    shutil.copytree(drawn, folder)
    (folder / "004.bmp").write_bytes(b"nothing")
    whole = (folder / "050.bmp").read_bytes()
    (folder / "050.bmp").write_bytes(whole[:-30])
    source = open_images(folder)
    _, failed = hash_images(source, ViewConfig())
    assert list(failed) == [4]  # the other one is found when it is decoded
    kept = FeatureCache(tmp_path / "cache", 1.0).get(extractor(("2",)), source)
    assert sorted(set(range(100)) - set(kept.index.tolist())) == [4, 50]
    assert not kept.rows("2", torch.tensor([4, 50])).any()
    for file in folder.iterdir():
        file.write_bytes(b"nothing")
    with user_error("unreadable-images", 100, folder):
        FeatureCache(tmp_path / "cache", 1.0).get(extractor(("2",)), open_images(folder))


def test_the_default_folder_is_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    assert FeatureCache(None, 1.0).folder == tmp_path / "there" / "localagg" / "features"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert FeatureCache(None, 1.0).folder == tmp_path / "home/.cache/localagg/features"


def test_a_budget_beyond_all_disks_is_all_of_them(tmp_path):
    assert FeatureCache(tmp_path, 1e300).budget == sys.maxsize
