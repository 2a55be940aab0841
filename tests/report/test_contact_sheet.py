import numpy as np
import pytest
import torch
from PIL import Image

from localagg import cli
from localagg.config import PretrainConfig, ViewConfig
from localagg.data.images.augment import Augment
from localagg.data.loading.cropping import evaluation_batches, training_crops
from localagg.data.sources.open import open_images
from localagg.errors import UserError
from localagg.report.contact_sheet import contact_sheet

VIEWS = ViewConfig(image_size=96, eval_crop=0.875)


def test_the_sheet_shows_the_views_of_training(pictures, tmp_path):
    source = open_images(pictures)
    path = tmp_path / "views.png"
    result = contact_sheet(source, PretrainConfig(views=VIEWS), 3, path, seed=5)
    rows = [0, 24, 47]  # evenly spread, rounded to even
    assert result["images"] == [source.name(i) for i in rows]
    sheet = np.array(Image.open(path)).transpose(2, 0, 1)
    assert sheet.shape == (3, 3 * 114 + 4, 8 * 100 + 4)
    augment = Augment(VIEWS, 5, cropped=True)
    measured = next(iter(evaluation_batches(source, VIEWS)))
    for row, i in enumerate(rows):
        index = torch.tensor([i])
        expected = [measured.images[i]]
        for epoch in range(7):
            batch, _ = training_crops(source, VIEWS, 5, epoch, index)
            expected.append((augment(batch.images, epoch, index)[0] * 255).round().to(torch.uint8))
        for column, view in enumerate(expected):
            top, left = row * 114 + 14, 4 + column * 100
            found = sheet[:, top : top + 96, left : left + 96]
            assert np.array_equal(found, view.numpy())


def test_small_views_are_enlarged_and_unreadable_images_left_out(pictures, tmp_path):
    data_folder = tmp_path / "data"
    data_folder.mkdir()
    for name, data in (("a.png", None), ("b.png", b""), ("c.png", None)):
        data = (pictures / "train/temple/00.png").read_bytes() if data is None else data
        (data_folder / name).write_bytes(data)
    source = open_images(data_folder)
    config = PretrainConfig(views=ViewConfig(image_size=20))
    result = contact_sheet(source, config, 9, tmp_path / "views.png")
    assert result["images"] == ["a.png", "c.png"]
    assert result["unreadable"] == {"b.png": "empty file"}
    sheet = np.array(Image.open(tmp_path / "views.png"))
    assert sheet.shape[:2] == (2 * (14 + 80 + 4) + 4, 8 * 84 + 4)
    view = sheet[14:94, 4:84]
    assert np.array_equal(view, view[::4, ::4].repeat(4, axis=0).repeat(4, axis=1))
    for path in data_folder.glob("[ac].png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        contact_sheet(open_images(data_folder), config, 2, tmp_path / "views.png")


def test_the_command_writes_it_and_refuses_other_files(pictures, tmp_path, capsys):
    words = ["inspect", str(pictures), "--recipe", "none", "--workers", "0"]
    path = tmp_path / "sheet.png"
    assert cli.main([*words, "--augmented", "2", "--sheet", str(path)]) == 0
    assert Image.open(path).size[1] == 2 * 114 + 4
    assert "sheet.png: measured, epoch 0" in capsys.readouterr().out
    for wrong in (["--sheet", str(tmp_path / "a.jpg")], ["--augmented", "0"]):
        assert cli.main([*words, "--augmented", "2", *wrong]) == 2
        assert wrong[0] in capsys.readouterr().err
