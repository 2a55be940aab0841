"""Pages in a real browser, without WebGL: drawn, safe, and usable by pointer, keys and phone."""

import contextlib
import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from localagg.report.charts import learning_curves
from localagg.report.embedding_page import Pictured, write_embedding_page
from localagg.report.gallery import Picture, Row, Section, write_gallery

HOSTILE = "<img src=x onerror=alert(1)>"
NAMES = [
    HOSTILE,
    "</script><script>alert(1)</script>",
    "\u202etxt.gpj",
    "שלום/תמונה.jpg",
    'a\nb,"c',
]


@contextlib.contextmanager
def opened(browser, path: Path, width: int = 1200, **options):
    """Open a page; fail on any console message, dialog, or request but for the file."""
    context = browser.new_context(viewport={"width": width, "height": 900}, **options)
    page = context.new_page()
    faults = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: faults.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_timeout(150)
    yield page
    inner = ("data:", "blob:")
    assert [f for f in faults if f != path.as_uri() and not f.startswith(inner)] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


class Colors:
    """Image i is a plane of color i."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        color = torch.tensor([i * 40 % 256, i * 7 % 256, 128], dtype=torch.uint8)
        return color.view(3, 1, 1).expand(3, 32, 48).contiguous()


def write_page(path, count, *, pictures=True, names=None, **columns):
    draws = torch.Generator().manual_seed(0)
    centers = torch.eye(8)[torch.arange(count) % 5]
    rows = F.normalize(centers + 0.1 * torch.randn(count, 8, generator=draws), dim=1)
    names = names or [f"folder/{i:03d}.jpg" for i in range(count)]
    images = Colors(count) if pictures else None
    line = {"step": 1, "epoch": 1, "loss": 1.0}
    foot = "<h2>How it learned</h2>" + learning_curves({HOSTILE: [line], "b": [line]})
    shown = Pictured(rows, names, columns, images)
    found = write_embedding_page(path, shown, title=HOSTILE, foot=foot)
    assert found["pictures"] == count * pictures
    return rows


def canvas_colors(page, selector=".stage > canvas"):
    """Number of pixels of the map that differ from its corner."""
    return page.evaluate(
        """(selector) => {
          const canvas = document.querySelector(selector), { width, height } = canvas;
          const image = canvas.getContext('2d').getImageData(0, 0, width, height);
          const all = new Uint32Array(image.data.buffer);
          return all.filter((color) => color !== all[0]).length;
        }""",
        selector,
    )


def test_there_is_no_webgl(browser, tmp_path):
    write_page(tmp_path / "page.html", 3)
    text = (tmp_path / "page.html").read_text()  # the map is drawn before the pictures are read
    assert text.index("<script type=module async>") < text.index("id=sheet-0")
    with opened(browser, tmp_path / "page.html") as page:
        assert page.evaluate("document.createElement('canvas').getContext('webgl')") is None
        assert canvas_colors(page) > 100


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    path = tmp_path_factory.mktemp("blobs") / "page.html"
    rows = write_page(path, 150, label=[f"class {i % 5}" for i in range(150)])
    return path, rows


def place_on_screen(page, id):
    """Return x and y of an item in the window."""
    box = page.locator(".stage > canvas").bounding_box()
    x, y = page.evaluate("(id) => window.localagg.map.toScreen(id)", id)
    return box["x"] + x + 1, box["y"] + y + 1  # the border


def test_hover_click_and_neighbors_show_the_right_pictures(browser, blobs):
    path, rows = blobs
    with opened(browser, path) as page:
        page.locator(".stage").scroll_into_view_if_needed()
        paths = page.evaluate("window.localagg.data.paths")
        places = np.array([place_on_screen(page, i) for i in range(150)])
        away = np.linalg.norm(places[:, None] - places, axis=2) + 99 * np.eye(150)
        for item in away.min(axis=1).argsort()[-3:].tolist():  # points that nothing hides
            page.mouse.move(*place_on_screen(page, item))
            assert page.locator(".tip bdi").inner_text() == paths[item]
            page.mouse.click(*place_on_screen(page, item))
            page.wait_for_function(
                "(path) => document.querySelector('.side .path')?.innerText === path",
                arg=paths[item],
            )
            row = int(paths[item][-7:-4])
            near = (rows @ rows[row]).argsort(descending=True)[1:13].tolist()
            shown = page.locator(".side .picture").evaluate_all("all => all.map(b => b.title)")
            assert shown == [f"folder/{i:03d}.jpg" for i in near]
            color = page.evaluate(
                "[...document.querySelector('.side canvas').getContext('2d')"
                ".getImageData(40, 40, 1, 1).data].slice(0, 2)"
            )
            assert np.abs(np.subtract(color, (row * 40 % 256, row * 7 % 256))).max() < 24


def test_the_lasso_selects_what_it_surrounds_and_the_list_is_saved(browser, blobs, tmp_path):
    path, _ = blobs
    with opened(browser, path, accept_downloads=True) as page:
        page.locator(".stage").scroll_into_view_if_needed()
        page.get_by_role("button", name="Lasso").click()
        places = np.array([place_on_screen(page, i) for i in range(150)])
        xs = np.sort(places[:, 0])
        widest = np.diff(xs)[40:110].argmax() + 40  # no point lies on the line
        middle = xs[widest : widest + 2].mean()
        box = page.locator(".stage > canvas").bounding_box()
        left, top, bottom = box["x"] + 3, box["y"] + 3, box["y"] + box["height"] - 3
        page.mouse.move(left, top)
        page.mouse.down()
        for corner in ((middle, top), (middle, bottom), (left, bottom)):
            page.mouse.move(*corner, steps=4)
        page.mouse.up()
        paths = page.evaluate("window.localagg.data.paths")
        expected = {paths[i] for i in range(150) if places[i, 0] < middle}
        assert 0 < len(expected) < 150
        with page.expect_download() as download:
            page.get_by_role("button", name="Save list").click()
        download.value.save_as(tmp_path / "list.csv")
        lines = list(csv.DictReader((tmp_path / "list.csv").open()))
        assert {line["path"] for line in lines} == expected
        assert all(line["label"] == f"class {int(line['path'][-7:-4]) % 5}" for line in lines)
        page.get_by_role("button", name="Clear").click()
        page.get_by_label("Color by").select_option("label")
        page.locator(".legend button", has_text="class 3").click()
        assert page.locator(".selection").inner_text().startswith("30 selected")


def test_keys_reach_everything(browser, blobs):
    path, _ = blobs
    with opened(browser, path) as page:
        seen = set()
        for _ in range(40):
            page.keyboard.press("Tab")
            focused = "document.activeElement"
            seen.add(page.evaluate(f"{focused}.ariaLabel?.slice(0, 6) || {focused}.innerText"))
        for wanted in (
            "Map",
            "Color ",
            "Lasso:",
            "Zoom i",
            "Whole ",
            "Map of",
            "Select on the map",
        ):
            assert wanted in seen, seen
        page.locator(".stage > canvas").focus()
        scale = page.evaluate("window.localagg.map.scale")
        page.keyboard.press("ArrowRight")
        page.wait_for_selector(".side .path")
        first = page.evaluate("window.localagg.map.current")
        page.keyboard.press("ArrowDown")
        assert page.evaluate("window.localagg.map.current") != first
        page.keyboard.press("+")
        assert page.evaluate("window.localagg.map.scale") > scale
        page.keyboard.press("Space")
        assert page.locator(".selection").inner_text().startswith("1 selected")
        page.keyboard.press("Escape")
        assert page.locator(".selection").inner_text() == ""
        picture = page.locator("section:not(.map-part) .picture").first
        picture.focus()
        page.keyboard.press("Enter")
        page.wait_for_selector("dialog[open] .path")
        assert page.locator("dialog .path").inner_text() == picture.get_attribute("title")
        page.keyboard.press("Escape")
        assert page.locator("dialog[open]").count() == 0


@pytest.mark.parametrize(
    ("count", "names", "columns"),
    [
        (0, None, {}),
        (1, [HOSTILE], {}),
        (2, None, {"label": [None, None]}),
        (5, NAMES, {HOSTILE: NAMES, "number": [0.5, 1.0, None, 2.0, float("nan")]}),
        (400, None, {"label": [f"class {i // 2}" for i in range(400)]}),
    ],
    ids=["none", "one", "without labels", "hostile names", "200 classes"],
)
def test_pages_of_any_contents_open_on_desktop_and_phone(browser, tmp_path, count, names, columns):
    path = tmp_path / "page.html"
    write_page(path, count, names=names, **columns)
    for options in ({"width": 1200}, {"width": 390, "color_scheme": "dark", "has_touch": True}):
        with opened(browser, path, **options) as page:
            assert page.locator("h1").inner_text() == HOSTILE
            assert page.locator("img").count() == 0
            assert (canvas_colors(page) > 0) == (count > 0)
            for column in page.locator("option").all_inner_texts():
                page.get_by_label("Color by").select_option(column)
            if count > 1:
                page.locator("section:not(.map-part) .picture").first.click()
                page.wait_for_selector("dialog[open] .path")
                shown = page.locator("dialog .path").text_content()
                assert shown in (names or [f"folder/{i:03d}.jpg" for i in range(count)])


def test_a_page_without_pictures_says_so(browser, tmp_path):
    path = tmp_path / "page.html"
    shown = Pictured(torch.eye(6), list("abcdef"), notes=["Without pictures: they moved."])
    assert write_embedding_page(path, shown, title="x")["pictures"] == 0
    with opened(browser, path) as page:
        assert "they moved" in page.locator(".map-part .note").first.inner_text()
        assert canvas_colors(page) > 10


def test_a_gallery_shows_files_and_their_lines(browser, tmp_path):
    good, bad = tmp_path / os.fsdecode(b"\xff.png"), tmp_path / "bad.jpg"
    Image.new("RGB", (64, 32), (200, 30, 30)).save(good)
    bad.write_bytes(b"no image")
    rows = [Row(HOSTILE, [Picture(good, [HOSTILE, "0.5"]), Picture(bad), Picture(good)])]
    write_gallery(
        tmp_path / "page.html", "Title", [Section("One", rows, "A note."), Section("Two", [])]
    )
    with opened(browser, tmp_path / "page.html", 390) as page:
        assert page.locator("h2").all_inner_texts() == ["One", "Two"]
        assert page.locator("h3").inner_text() == HOSTILE
        assert page.locator(".picture span").all_inner_texts() == [HOSTILE, "0.5"]
        assert page.locator(".missing").count() == 1
        page.locator(".picture").first.click()
        page.wait_for_selector("dialog[open]")
        assert page.locator("dialog .path").inner_text() == rf"{tmp_path}/\xff.png"
        color = page.evaluate(
            "[...document.querySelector('dialog canvas').getContext('2d')"
            ".getImageData(40, 20, 1, 1).data]"
        )
        assert np.abs(np.subtract(color[:3], (200, 30, 30))).max() < 12
