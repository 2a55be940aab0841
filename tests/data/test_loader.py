import shutil

import pytest
import torch

from localagg.config import PretrainConfig, UserError, override
from localagg.data.augment import Augment, evaluation_view, ten_crop_views
from localagg.data.decode import decode
from localagg.data.loader import Feed, Throttle, evaluation_batches, typical_side
from localagg.data.sources import open_images

CONFIG = override(PretrainConfig(), batch_size=10, image_size=24, eval_crop=1.0, workers=0)


def quiet(done, of):
    pass


@pytest.fixture
def feed(pictures):
    return Feed(open_images(pictures), override(CONFIG, memory="never"), quiet)


def test_an_epoch_shows_whole_batches_of_different_images(feed):
    assert feed.steps == 4
    seen = torch.cat([batch.index for batch in feed.batches(0)])
    assert len(set(seen.tolist())) == 40
    later = torch.cat([batch.index for batch in feed.batches(1)])
    assert not torch.equal(seen, later)
    everything = torch.cat([feed.order(epoch) for epoch in range(20)])
    assert set(everything.tolist()) == set(range(48))  # what an epoch leaves out differs


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers_or_on_where_one_starts(feed, pictures, workers):
    other = Feed(open_images(pictures), override(CONFIG, memory="never", workers=workers), quiet)
    expected = list(feed.batches(3))
    for first in (0, 2):
        for one, two in zip(expected[first:], other.batches(3, first), strict=True):
            assert torch.equal(one.index, two.index)
            assert torch.equal(one.images, two.images)


def test_small_images_of_one_size_are_held_in_memory():
    source = open_images("digits")
    feed = Feed(source, CONFIG, quiet)
    assert feed.pixels.shape == (1400, 3, 8, 8)
    batch = next(feed.batches(0))
    assert torch.equal(batch.images[3], source[int(batch.index[3])].image)
    assert not feed.cropped
    tiny = Feed(source, override(CONFIG, memory_gb=1e-6), quiet)
    assert tiny.pixels is None
    assert tiny.cropped


def test_images_of_different_sizes_cannot_be_held(pictures):
    with pytest.raises(UserError, match="another size"):
        Feed(open_images(pictures), override(CONFIG, memory="always"), quiet)


@pytest.fixture
def one_size(pictures, tmp_path):
    """Four photographs of 48 x 48 pixels."""
    folder = tmp_path / "one-size"
    folder.mkdir()
    for file in (pictures / "train" / "temple").iterdir():
        if int(file.stem) % 6 == 0:
            shutil.copy(file, folder)
    return open_images(folder)


@pytest.mark.parametrize("crop", ["resized", "fixed", "center"])
@pytest.mark.parametrize("augmentation", ["torchvision", "reference"])
def test_workers_crop_as_the_device_does(one_size, augmentation, crop):
    """A view is the same, torchvision's up to the rounding of the worker's uint8 crop."""
    config = override(
        CONFIG, batch_size=4, augmentation=augmentation, crop=crop, eval_crop=0.875, gray=0.5
    )
    if augmentation == "torchvision":  # color multiplies the rounding
        config = override(config, jitter=(0.0, 0.0, 0.0, 0.0), gray=0.0)
    views = []
    for memory in ("always", "never"):
        feed = Feed(one_size, override(config, memory=memory), quiet)
        index, images = next(feed.batches(0))
        views.append(Augment(config.views, 0, cropped=feed.cropped)(images, 0, index))
    tolerance = 1.01 / 255 if augmentation == "torchvision" else 0
    assert (views[0] - views[1]).abs().max() <= tolerance


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augmentation", ["torchvision", "reference"])
def test_evaluation_through_workers_equals_that_in_memory(one_size, augmentation, workers):
    views = override(CONFIG.views, augmentation=augmentation, eval_crop=0.875)
    pixels = torch.stack([decode(one_size[i].image) for i in range(4)])
    for ten_crop, expected in (
        (False, evaluation_view(pixels, views)),
        (True, ten_crop_views(pixels, views)),
    ):
        batches = evaluation_batches(one_size, views, batch=3, workers=workers, ten_crop=ten_crop)
        found = torch.cat([batch.images for batch in batches])
        assert found.dtype == torch.uint8
        assert found.shape == expected.shape == ((4, 10, 3, 24, 24) if ten_crop else (4, 3, 24, 24))
        tolerance = 1.01 if augmentation == "torchvision" else 1e-4
        assert (found - expected * 255).abs().max() < tolerance


def test_a_batch_larger_than_the_data_is_refused(pictures):
    with pytest.raises(UserError, match="--batch-size 60 is more than the 48 images"):
        Feed(open_images(pictures), override(CONFIG, batch_size=60), quiet)


def test_evaluation_shows_each_readable_image_once_in_order(pictures, tmp_path):

    shutil.copytree(pictures / "train", tmp_path / "data")
    (tmp_path / "data" / "flower" / "02.jpg").write_bytes(b"broken")
    source = open_images(tmp_path / "data")
    batches = list(evaluation_batches(source, CONFIG.views, batch=7))
    index = torch.cat([batch.index for batch in batches])
    assert index.tolist() == [i for i in range(48) if i != 2]
    assert batches[0].images.shape == (6, 3, 24, 24)
    assert decode(source[0].image).shape[0] == 3


def test_a_vanished_file_is_named_once_and_left_out(pictures, tmp_path):
    shutil.copytree(pictures / "train", tmp_path / "data")
    source = open_images(tmp_path / "data")
    (tmp_path / "data" / "flower" / "00.png").unlink()
    assert typical_side(source) > 0
    with pytest.raises(UserError, match=r"00.png \(No such file or directory\);"):
        Feed(source, override(CONFIG, memory="never"), quiet)
    for ten_crop in (False, True):
        batches = evaluation_batches(source, CONFIG.views, batch=1, ten_crop=ten_crop)
        assert [int(batch.index) for batch in batches] == list(range(1, 48))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_record_is_told_in_one_sentence_from_any_process(pictures, workers):
    source = open_images(pictures)
    config = override(CONFIG, memory="never", workers=workers)
    feed = Feed(source, config, quiet)

    class Damaged:
        """A source one of whose records turns out to be damaged after the start."""

        def __getattr__(self, name):
            return getattr(source, name)

        def __len__(self):
            return len(source)

        def __getitem__(self, index):
            if index == first:
                raise UserError("train-00000 is damaged at byte 17.")
            return source[index]

    first = int(feed.order(0)[0])
    feed.source = Damaged()
    with pytest.raises(UserError) as caught:
        list(feed.batches(0))
    assert f"{source.name(first)} (train-00000 is damaged at byte 17.)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_typical_side_is_the_median_of_the_shorter_ones(pictures):
    source = open_images(pictures)
    sides = sorted(min(decode(source[i].image).shape[1:]) for i in range(48))
    assert typical_side(source) == sides[24]


def test_throttle_always_lets_the_last_through():
    calls = []
    throttle = Throttle(lambda done, of: calls.append(done), seconds=100)
    for done in range(1, 6):
        throttle(done, 5)
    assert calls == [1, 5]
