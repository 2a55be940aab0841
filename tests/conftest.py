"""Shared by all tests: one thread each (they run in parallel), real small images, the fixtures."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and faiss read it

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)
with contextlib.suppress(ModuleNotFoundError):  # a GPU machine may lack it: make gpu
    from hypothesis import settings

    settings.register_profile("here", deadline=None, max_examples=60, derandomize=True)
    settings.load_profile("here")

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the modules that have slow tests, or one worker ends long after the other."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that need a GPU where there is none."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Numbers of the reference program."""
    if not FIXTURES.is_dir():
        pytest.skip("the reference program's fixtures are not on this machine")
    return FIXTURES


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tests leave nothing in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ of two classes: crops of scikit-learn's two photographs, as JPEG and PNG."""
    from sklearn.datasets import load_sample_images

    root = tmp_path_factory.mktemp("pictures")
    draws = np.random.RandomState(0)
    for split, count in (("train", 24), ("val", 6)):
        for name, photo in zip(("temple", "flower"), load_sample_images().images, strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                side = draws.randint(100, 200)
                top, left = draws.randint(0, 427 - side), draws.randint(0, 640 - side)
                crop = Image.fromarray(photo[top : top + side, left : left + side])
                crop = crop.resize((48 + i % 3 * 8, 48 + i % 2 * 16))
                crop.save(folder / f"{i:02d}.{'png' if i % 4 == 0 else 'jpg'}")
    return root


@pytest.fixture
def flat(pictures, tmp_path):
    """Twelve images without classes."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for kind in ("flower", "temple"):
        for image in (pictures / "val" / kind).iterdir():
            shutil.copy(image, folder / f"{kind}-{image.name}")
    return folder
