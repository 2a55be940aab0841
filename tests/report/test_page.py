import datasets
import torch

from localagg.data import open_images
from localagg.report.page import neighbor_grid


def test_neighbors_show_right_and_wrong_classes(pictures):
    source = open_images(pictures)
    rows = torch.zeros(48, 2)
    rows[source.labels == 0, 0] = 1
    rows[source.labels == 1, 1] = 1
    page = neighbor_grid(rows, source, rows, source, count=4, k=5)
    assert page.count("class=row") == 4
    assert page.count("class=right") == 20
    assert "class=wrong" not in page
    swapped = neighbor_grid(rows.flip(1), source, rows, source, count=4, k=5)
    assert swapped.count("class=wrong") == 20


def test_images_without_a_label_have_no_verdict(pictures, tmp_path):
    source = open_images(pictures, "val")
    kinds = datasets.ClassLabel(names=["a", "b"])
    images = [{"image": {"bytes": source[i].image, "path": None}, "label": -1} for i in range(3)]
    columns = datasets.Features({"image": datasets.Image(), "label": kinds})
    datasets.Dataset.from_list(images, features=columns).save_to_disk(tmp_path / "saved")
    saved, rows = open_images(tmp_path / "saved"), torch.eye(3)
    page = neighbor_grid(rows, saved, rows, saved, count=2, k=3)
    assert page.count("class=row") == 2
    assert page.count("<img ") == 8
    assert "class=right" not in page
    assert "class=wrong" not in page
