import shutil
from dataclasses import replace

import pytest
import torch
from expect import user_error
from failing_source import FailingSource

from localagg.config import ViewConfig
from localagg.data.images.augment import Augment
from localagg.data.loading.loader import Feed, on_device
from localagg.data.sources.open import open_images
from localagg.errors import UserError

VIEWS = ViewConfig(image_size=24, eval_crop=1.0)
SKIP = {"memory": "never", "unreadable": "skip"}


def load(source, views=VIEWS, batch_size=10, **options):
    return Feed(source, views, batch_size=batch_size, **options)


@pytest.fixture
def feed(pictures):
    return load(open_images(pictures), memory="never")


def test_an_epoch_is_made_of_whole_batches_of_different_images(feed):
    assert feed.steps == 4
    seen = torch.cat([batch.index for batch in feed.batches(0)])
    assert len(set(seen.tolist())) == 40
    later = torch.cat([batch.index for batch in feed.batches(1)])
    assert not torch.equal(seen, later)
    everything = torch.cat([feed.order(epoch) for epoch in range(20)])
    assert set(everything.tolist()) == set(range(48))  # each epoch drops other images


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_neither_on_workers_nor_on_the_first_batch(feed, pictures, workers):
    other = load(open_images(pictures), memory="never", workers=workers)
    expected = list(feed.batches(3))
    for first in (0, 2):
        for one, two in zip(expected[first:], other.batches(3, first), strict=True):
            assert all(map(torch.equal, one, two))


def test_small_images_of_one_size_are_held_in_memory():
    source = open_images("digits")
    feed = load(source)
    assert feed.pixels.shape == (1400, 3, 8, 8)
    batch = next(feed.batches(0))
    assert torch.equal(batch.images[3], source[int(batch.index[3])].image)
    assert not feed.cropped
    tiny = load(source, memory_gb=1e-6)
    assert tiny.pixels is None
    assert tiny.cropped


@pytest.mark.parametrize("crop", ["resized", "fixed", "center"])
@pytest.mark.parametrize("augmentation", ["torchvision", "reference"])
def test_workers_crop_as_the_device_does(one_size, augmentation, crop):
    """A view is the same, torchvision's up to the rounding of the worker's uint8 crop."""
    config = replace(VIEWS, augmentation=augmentation, crop=crop, eval_crop=0.875, gray=0.5)
    if augmentation == "torchvision":  # color multiplies the rounding
        config = replace(config, jitter=(0.0, 0.0, 0.0, 0.0), gray=0.0)
    views = []
    for memory in ("always", "never"):
        feed = load(one_size, config, batch_size=4, memory=memory)
        index, images, uniforms = next(feed.batches(0))
        augment = Augment(config, 0, cropped=feed.cropped)
        views.append(augment(images, 0, index, uniforms))
        assert torch.equal(views[-1], augment(images, 0, index))  # the draws are those of the batch
    tolerance = 1.01 / 255 if augmentation == "torchvision" else 0
    assert (views[0] - views[1]).abs().max() <= tolerance


def test_a_batch_larger_than_the_data_is_an_error(pictures, feed):
    with user_error("option-invalid", "--batch-size", 60, 48):
        load(open_images(pictures), batch_size=60)
    with user_error("option-invalid", "--ir-batch-size", 49, 48):
        feed.check_batch_size(49, "ir_batch_size")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_record_is_named_from_any_process(pictures, workers):
    source = open_images(pictures)
    feed = load(source, memory="never", workers=workers)
    first = int(feed.order(0)[0])
    error = UserError("damaged", "train-00000 is damaged at byte 17.")
    feed.source = FailingSource(source, [first], error=error)
    with user_error("unreadable-images", f"{source.name(first)} ({error})"):
        list(feed.batches(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_replaced_within_its_batch_and_not_read_again(pictures, workers):
    """Batches keep their size and all their other images, before and after it is known."""
    source = open_images(pictures)
    feed = load(source, **SKIP, workers=workers)
    expected = {epoch: list(feed.batches(epoch)) for epoch in (0, 1)}
    bad = {int(expected[0][1].index[i]) for i in (0, 3, 9)} | {int(expected[0][2].index[5])}
    feed.source = failing = FailingSource(source, bad)
    for epoch in (0, 1):
        failing.read.clear()
        for whole, found in zip(expected[epoch], feed.batches(epoch), strict=True):
            good = [i for i in range(10) if int(whole.index[i]) not in bad]
            filled = (good * 10)[:10]
            for one, two in zip(whole, found, strict=True):
                assert torch.equal(two, one[filled])
        assert feed.unreadable.keys() == bad
        assert set(feed.unreadable.values()) == {"it is text; download it again"}
        if epoch and not workers:
            assert not bad & set(failing.read)
    assert (feed.steps, len(feed.valid)) == (4, 48)
    assert feed.state() == {"left_out": [], "unreadable": sorted(bad)}


def test_a_resumed_run_draws_the_same_batches(pictures, tmp_path):
    """It excludes the images that were unreadable at its start, also if they were repaired."""
    shutil.copytree(pictures / "train", tmp_path / "data")
    (tmp_path / "data" / "flower" / "02.jpg").write_bytes(b"broken")
    source = open_images(tmp_path / "data")
    feed = load(source, **SKIP)
    assert feed.state() == {"left_out": [2], "unreadable": [2]}
    feed.source = FailingSource(source, [5, 7])
    expected = [list(feed.batches(epoch)) for epoch in (0, 1)]
    assert feed.state() == {"left_out": [2], "unreadable": [2, 5, 7]}
    shutil.copy(pictures / "train" / "flower" / "02.jpg", tmp_path / "data" / "flower" / "02.jpg")
    again = load(open_images(tmp_path / "data"), **SKIP, before=feed.state())
    assert len(again.valid) == 47
    for one, two in zip(expected[1], again.batches(1), strict=True):
        assert all(map(torch.equal, one, two))


def test_images_excluded_later_are_never_drawn(feed, pictures):
    skipping = load(open_images(pictures), **SKIP)
    skipping.exclude({3: "damaged", 11: "damaged"})
    assert (len(skipping.valid), skipping.steps) == (46, 4)
    assert not {3, 11} & {i for epoch in range(9) for i in skipping.order(epoch).tolist()}
    with user_error("unreadable-images", "damaged"):
        feed.exclude({3: "damaged"})


def test_unreadable_images_in_memory_are_never_shown(one_size, tmp_path):
    """Their pixels are zero."""
    shutil.copytree(one_size.root, tmp_path / "data")
    (tmp_path / "data" / sorted(one_size.paths)[1]).write_bytes(b"")
    source = open_images(tmp_path / "data")
    before = {"left_out": [], "unreadable": []}  # it was whole when the run began
    for given in (None, before):
        feed = load(source, memory="always", unreadable="skip", batch_size=3, before=given)
        assert len(feed.valid) == (3 if given is None else 4)
        for epoch in range(5):
            for batch in feed.batches(epoch):
                assert 1 not in batch.index.tolist()
                assert (batch.images.flatten(1).max(dim=1).values > 0).all()
    with user_error("unreadable-images", "1 of 4", "(empty file)"):
        load(source, memory="always", batch_size=3, before=before)


def test_a_batch_without_any_readable_image_is_an_error(pictures):
    source = open_images(pictures)
    feed = load(source, **SKIP)
    feed.source = FailingSource(source, feed.order(0)[10:20].tolist())
    batches = feed.batches(0)
    next(batches)
    with user_error("unreadable-images", 10):
        next(batches)


def test_batches_on_the_cpu_stay_as_they_are(feed):
    moved = on_device(feed.batches(0), torch.device("cpu"))
    for one, two in zip(feed.batches(0), moved, strict=True):
        assert all(map(torch.equal, one, two))


@pytest.mark.cuda
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_arrive_whole_on_cuda_while_it_computes(pictures, workers):
    feed = load(open_images(pictures), **SKIP, workers=workers)
    moved = on_device(feed.batches(0), torch.device("cuda"))
    for one, two in zip(feed.batches(0), moved, strict=True):
        torch.randn(2000, 2000, device="cuda") @ torch.randn(2000, 2000, device="cuda")
        assert torch.equal(two.images.cpu(), one.images)
        assert two.index.is_pinned()
        assert torch.equal(two.index, one.index)
