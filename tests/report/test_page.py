import torch

from localagg.data import open_images
from localagg.report.charts import curves, space_map
from localagg.report.page import Page, neighbor_grid, table, write_page


def unit(count):
    rows = torch.randn(count, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(rows, dim=1)


def test_neighbors_show_right_and_wrong_classes(pictures):
    source = open_images(pictures)
    rows = torch.zeros(48, 2)
    rows[source.labels == 0, 0] = 1
    rows[source.labels == 1, 1] = 1
    page = neighbor_grid(rows, source, rows, source, rows=4, k=5)
    assert page.count("class=row") == 4
    assert page.count("class=right") == 20
    assert "class=wrong" not in page
    swapped = neighbor_grid(rows.flip(1), source, rows, source, rows=4, k=5)
    assert swapped.count("class=wrong") == 20


def test_names_are_escaped(tmp_path):
    from PIL import Image

    for name in ("<b>", "c&d"):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.new("RGB", (8, 8), (i * 40, 0, 0)).save(tmp_path / name / f"{i}.png")
    source = open_images(tmp_path)
    page = Page("<i>", "a & b")
    page.add("map", space_map(unit(12), source))
    page.add("grid", neighbor_grid(unit(12), source, unit(12), source))
    page.add("table", table([{"name": "<u>", "knn1": 0.5}]))
    write_page(tmp_path / "page.html", page)
    text = (tmp_path / "page.html").read_text()
    for raw in ("<title><i>", "<b>/0.png", "<td><u>"):
        assert raw not in text
    assert "a &amp; b" in text
    assert "&lt;b&gt;/0.png" in text


def test_curves_hold_every_measurement():
    lines = [
        {"step": 1, "epoch": 1, "loss": 7.0},
        {"step": 2, "epoch": 2, "loss": 6.0},
        {"step": 2, "epoch": 2, "knn1": 0.5},
    ]
    found = curves({"IR": lines, "LA": lines}, switch=1)
    assert found.count('"name":"IR"') == 2
    assert "knn1" in found
