import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
from torch.utils.data import Dataset

from localagg.config import ViewConfig
from localagg.data.images.augment import Augment, evaluation_view, ten_crop_views
from localagg.data.images.decode import decode
from localagg.data.loading.cropping import evaluation_batches
from localagg.data.loading.loader import Feed, on_device
from localagg.data.loading.scan import load_or_scan, typical_side
from localagg.data.loading.workers import convert_worker_death, iterate_in_workers
from localagg.data.sources.open import open_images
from localagg.errors import UserError

VIEWS = ViewConfig(image_size=24, eval_crop=1.0)


def load(source, views=VIEWS, batch_size=10, **options):
    return Feed(source, views, batch_size=batch_size, **options)


@pytest.fixture
def feed(pictures):
    return load(open_images(pictures), memory="never")


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
    other = load(open_images(pictures), memory="never", workers=workers)
    expected = list(feed.batches(3))
    for first in (0, 2):
        for one, two in zip(expected[first:], other.batches(3, first), strict=True):
            assert torch.equal(one.index, two.index)
            assert torch.equal(one.images, two.images)


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


def test_images_of_different_sizes_cannot_be_held(pictures):
    with pytest.raises(UserError, match="--memory auto"):
        load(open_images(pictures), memory="always")


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


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augmentation", ["torchvision", "reference"])
def test_evaluation_through_workers_equals_that_in_memory(one_size, augmentation, workers):
    views = replace(VIEWS, augmentation=augmentation, eval_crop=0.875)
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
    with pytest.raises(UserError, match="--batch-size is 60; it must be at most 48"):
        load(open_images(pictures), batch_size=60)


def test_evaluation_shows_each_readable_image_once_in_order(pictures, tmp_path):

    shutil.copytree(pictures / "train", tmp_path / "data")
    (tmp_path / "data" / "flower" / "02.jpg").write_bytes(b"broken")
    source = open_images(tmp_path / "data")
    batches = list(evaluation_batches(source, VIEWS, batch=7))
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
        load(source, memory="never")
    for ten_crop in (False, True):
        batches = evaluation_batches(source, VIEWS, batch=1, ten_crop=ten_crop)
        assert [int(batch.index) for batch in batches] == list(range(1, 48))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_record_is_told_in_one_sentence_from_any_process(pictures, workers):
    source = open_images(pictures)
    feed = load(source, memory="never", workers=workers)

    class Damaged:
        """A source one of whose records turns out to be damaged after the start."""

        def __getattr__(self, name):
            return getattr(source, name)

        def __len__(self):
            return len(source)

        def __getitem__(self, index):
            if index == first:
                raise UserError("TODO", "train-00000 is damaged at byte 17.")
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


# --- Bad images in training -----------------------------------------------------------------------


class Failing:
    """A source some of whose images turn out to be damaged when they are decoded."""

    def __init__(self, source, bad, *, kill=False):
        self.source, self.bad, self.kill = source, set(bad), kill
        self.asked = []

    def __getattr__(self, name):
        return getattr(self.__dict__["source"], name)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        self.asked.append(index)
        if index in self.bad and self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if index in self.bad:
            return self.source[index]._replace(image=b"damaged since")
        return self.source[index]


SKIP = {"memory": "never", "unreadable": "skip"}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_replaced_within_its_batch_and_read_no_more(pictures, workers):
    """Batches keep their size and all others their images, before and after it is known."""
    source = open_images(pictures)
    feed = load(source, **SKIP, workers=workers)
    expected = {epoch: list(feed.batches(epoch)) for epoch in (0, 1)}
    bad = {int(expected[0][1].index[i]) for i in (0, 3, 9)} | {int(expected[0][2].index[5])}
    feed.source = failing = Failing(source, bad)
    for epoch in (0, 1):
        failing.asked.clear()
        for whole, found in zip(expected[epoch], feed.batches(epoch), strict=True):
            good = [i for i in range(10) if int(whole.index[i]) not in bad]
            filled = (good * 10)[:10]
            assert torch.equal(found.index, whole.index[filled])
            assert torch.equal(found.images, whole.images[filled])
        assert feed.unreadable.keys() == bad
        assert set(feed.unreadable.values()) == {"not an image"}
        if epoch and not workers:
            assert not bad & set(failing.asked)
    assert (feed.steps, len(feed.valid)) == (4, 48)
    assert feed.state() == {"left_out": [], "unreadable": sorted(bad)}


def test_a_run_that_goes_on_draws_the_same_batches(pictures, tmp_path):
    """Left out are those that were when it began, whatever has become of the files."""
    shutil.copytree(pictures / "train", tmp_path / "data")
    (tmp_path / "data" / "flower" / "02.jpg").write_bytes(b"broken")
    source = open_images(tmp_path / "data")
    feed = load(source, **SKIP)
    assert feed.state() == {"left_out": [2], "unreadable": [2]}
    feed.source = Failing(source, [5, 7])
    expected = [list(feed.batches(epoch)) for epoch in (0, 1)]
    assert feed.state() == {"left_out": [2], "unreadable": [2, 5, 7]}
    shutil.copy(pictures / "train" / "flower" / "02.jpg", tmp_path / "data" / "flower" / "02.jpg")
    again = load(open_images(tmp_path / "data"), **SKIP, before=feed.state())
    assert len(again.valid) == 47
    for one, two in zip(expected[1], again.batches(1), strict=True):
        assert torch.equal(one.index, two.index)
        assert torch.equal(one.images, two.images)


def test_held_images_that_cannot_be_read_are_never_shown(one_size, tmp_path):
    """In memory their rows are black."""
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
    with pytest.raises(UserError, match=r"1 of 4 images cannot be read: .*\(empty file\)"):
        load(source, memory="always", batch_size=3, before=before)


def test_a_batch_without_any_readable_image_is_refused(pictures):
    source = open_images(pictures)
    feed = load(source, **SKIP)
    feed.source = Failing(source, feed.order(0)[10:20].tolist())
    batches = feed.batches(0)
    next(batches)
    with pytest.raises(UserError, match="None of the 10 images of a batch can be read"):
        next(batches)


def test_many_headers_are_read_by_workers_and_the_same_are_found(pictures, tmp_path):
    shutil.copytree(pictures / "train", tmp_path / "data")
    for name in ("flower/02.jpg", "temple/11.jpg"):
        path = tmp_path / "data" / name
        path.write_bytes(path.read_bytes()[:-40])
    source = open_images(tmp_path / "data")
    found, told = [], []
    for few in (10_000, 0):
        scanned = load_or_scan(
            source,
            memory="never",
            workers=2,
            on_progress=lambda done, of: told.append((done, of)),
            serial_below=few,
            chunk=10,
        )
        assert scanned.pixels is None
        found.append((scanned.unreadable, scanned.sizes))
        assert told == [(10, 48), (20, 48), (30, 48), (40, 48), (48, 48)]
        told.clear()
    assert found[0] == found[1]
    assert list(found[0][0]) == [2, 35]
    assert found[0][1] == {
        tuple(decode(source[i].image).shape[1:]) for i in range(48) if i not in (2, 35)
    }


# --- Workers that die -----------------------------------------------------------------------------


class Tensors(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.full((1000,), index)


@pytest.mark.parametrize("position", [0, 25])
def test_a_killed_worker_is_one_sentence_and_no_hang(pictures, position):
    source = open_images(pictures)
    feed = load(source, **SKIP, workers=2)
    feed.source = Failing(source, [int(feed.order(0)[position])], kill=True)

    def learn():
        for _ in feed.batches(0):
            time.sleep(0.05)  # it may die while nobody waits for it

    said = r"A worker process .* was killed, .* fewer --workers"
    with pytest.raises(UserError, match=said), convert_worker_death():
        learn()


def test_a_worker_that_was_killed_with_its_items_not_fetched_is_one_sentence(monkeypatch):
    # Sockets of a killed process close a little before it counts as dead, and torch looks once.
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "is_alive", lambda _: True)
    items = iterate_in_workers(Tensors(), 1)
    next(items)
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        time.sleep(1)  # until the next items are announced
        for worker in multiprocessing.active_children():
            worker.kill()
        with pytest.raises(UserError, match=r"A worker process .* was killed"):
            next(items)
    finally:
        signal.signal(signal.SIGCHLD, handler)


def test_a_lost_connection_while_all_workers_live_is_what_it_is():
    items = iterate_in_workers(Tensors(), 1)
    next(items)
    with pytest.raises(ConnectionResetError):
        items.throw(ConnectionResetError())  # pyright: ignore[reportAttributeAccessIssue]


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="of the network"), convert_worker_death():
        raise RuntimeError("of the network")


def test_batches_move_to_the_device_as_they_are(feed):
    moved = list(on_device(feed.batches(0), torch.device("cpu")))
    for one, two in zip(feed.batches(0), moved, strict=True):
        assert torch.equal(one.index, two.index)
        assert torch.equal(one.images, two.images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_right_on_cuda_while_it_computes(pictures, workers):
    feed = load(open_images(pictures), **SKIP, workers=workers)
    moved = on_device(feed.batches(0), torch.device("cuda"))
    for one, two in zip(feed.batches(0), moved, strict=True):
        torch.randn(2000, 2000, device="cuda") @ torch.randn(2000, 2000, device="cuda")
        assert torch.equal(two.images.cpu(), one.images)
        assert torch.equal(two.index.cpu(), one.index)
