import shutil

import pytest

from localagg.data.sources.open import open_images


@pytest.fixture
def one_size(pictures, tmp_path):
    """Four photographs of 48 x 48 pixels."""
    folder = tmp_path / "one-size"
    folder.mkdir()
    for file in (pictures / "train" / "temple").iterdir():
        if int(file.stem) % 6 == 0:
            shutil.copy(file, folder)
    return open_images(folder)
