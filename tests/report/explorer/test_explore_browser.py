"""The explorer in a real browser: the map draws, a click shows neighbors, a label is saved."""

import contextlib
import threading

import pytest
from explorer_space import COUNT, make_space, png

from localagg.report.explorer import server

uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")


@contextlib.contextmanager
def served(space):
    """Serve a space in a thread; yield its address."""
    with server._listen(0) as listener:
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        app = server.make_app(space, "token", host, title="forty")
        running = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://{host}/token/"
        running.should_exit = True
        thread.join()


@pytest.mark.parametrize("width", [1200, 390])
def test_map_neighbors_search_and_labels(browser, tmp_path, width):
    space = make_space(tmp_path)
    with served(space) as address:
        page = browser.new_page(viewport={"width": width, "height": 900})
        faults = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda r: r.url.startswith(address) or faults.append(r.url))
        page.goto(address)
        while not page.evaluate(
            "window.localagg?.map.width"
        ):  # the policy forbids waiting for code
            page.wait_for_timeout(50)
        canvas = page.locator(".stage > canvas")
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        x, y = page.evaluate("window.localagg.map.toScreen(7)")
        page.mouse.click(box["x"] + x + 1, box["y"] + y + 1)
        page.wait_for_selector(".side .picture")
        item = space.shown.paths.index(page.locator(".side .path").inner_text())
        shown = [int(p.get_attribute("data-id")) for p in page.locator(".side .picture").all()]
        assert shown == [i for i, _ in space.nearest(space.shown.rows[item][None], item)]

        page.get_by_label("Find paths").fill("a/3")
        page.get_by_role("button", name="Find", exact=True).click()
        page.wait_for_selector("text=Selected 11 images.")
        page.get_by_label("Label the selection").fill("<b>odd")
        page.get_by_role("button", name="Save label").click()
        page.wait_for_selector("text=Saved the label")
        names, codes = make_space(tmp_path).label_column()
        assert [names[c] for c in codes].count("<b>odd") == 11

        file = {"name": "x.png", "mimeType": "image/png", "buffer": png(COUNT - 1)}
        page.get_by_label("Search by a picture").set_input_files(file)
        page.wait_for_selector(".results .picture")
        assert page.locator(".results .picture").first.get_attribute("data-id") == str(COUNT - 1)
        # Tools stand above the map, where they are found without scrolling.
        top = page.locator(".stage").bounding_box()["y"]
        for tool in ("Find paths", "Search by a picture", "Label the selection"):
            assert page.get_by_label(tool).bounding_box()["y"] < top
        assert page.locator(".results").bounding_box()["height"] < 100
        page.get_by_role("button", name="Clear").click()
        assert page.get_by_label("Label the selection").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert faults == []
        page.close()
