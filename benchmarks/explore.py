"""How fast are `localagg explore` with a million images, and the page of a run, in Chromium?

Random rows around 1,000 centers, their places on the map around 1,000 others, one column of 50
labels, and no pictures. The server runs in a thread of this process. ``--pages`` also opens pages
that ``localagg report`` wrote.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import uvicorn
from browser import PAN, open_browser, press_key

import report
from localagg.report.embedding_page import Pictured
from localagg.report.explorer import server
from localagg.report.explorer.space import Space

_CENTERS = 1000
_QUERY = """async (id) => {
  const start = performance.now();
  await (await fetch(`details/${id}`)).json();
  return performance.now() - start;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--pages", type=Path, nargs="+", default=[])
    options, rows = parser.parse_args(), []
    for page_file in options.pages:
        with open_browser() as page:
            opened = [press_key(page, page_file.absolute().as_uri()) for _ in range(5)]
            mapped, ready = (statistics.median(times) for times in zip(*opened, strict=True))
            count, rate = page.evaluate("window.localagg.items.count"), page.evaluate(PAN)
        size = f"page, {page_file.stat().st_size / 1e6:.0f} MB"
        rows.append([size, f"{count:,}", f"{mapped:.2f}", f"{ready:.2f}", f"{rate:.0f}", "", ""])
        print(rows[-1], flush=True)
    for count in options.counts:
        with tempfile.TemporaryDirectory() as folder:
            space = make_space(count, Path(folder))
            timed(space, 0)  # waits for the copy that the server prepares
            with served(space) as address, open_browser() as page:
                opened = [press_key(page, address) for _ in range(5)]
                mapped, ready = (statistics.median(times) for times in zip(*opened, strict=True))
                rate = page.evaluate(PAN)
                asked = statistics.median(
                    page.evaluate(_QUERY, 7919 * n % count) for n in range(31)
                )
            search = 1000 * statistics.median(timed(space, 104_729 * n % count) for n in range(31))
        numbers = [f"{mapped:.2f}", f"{ready:.2f}", f"{rate:.0f}", f"{asked:.0f}", f"{search:.0f}"]
        rows.append(["explore", f"{count:,}", *numbers])
        print(rows[-1], flush=True)
    columns = ["", "images", "s to the map", "s to interact", "pan, frames a s", "query, ms"]
    report.write(
        "explore",
        "The explorer and the page of a run in Chromium",
        [*columns, "of it search"],
        rows,
        "Medians of 5. To the map: from opening the address to a drawn map. To interact: until an"
        " image chosen by key shows its neighbors. Frames: median of 60, at most 60, without a GPU."
        " Query: the 12 nearest by 128 numbers an image, exact, asked by the page; medians of 31."
        " The start of the server is not counted. A pass over float32 rows took"
        f" {read_speed():.0f} GB/s at the end, under a load of {os.getloadavg()[0]:.1f}: other"
        " programs slow all numbers.",
    )


def read_speed() -> float:
    """Return GB/s of adding up 512 MB, which bounds every search."""
    rows = torch.ones(1 << 27)
    return 0.512 * 1.048576 / report.interleaved({"sum": rows.sum}, 5)["sum"]


def make_space(count: int, folder: Path) -> Space:
    draws = torch.Generator().manual_seed(0)
    group = torch.arange(count) % _CENTERS
    centers = torch.randn(_CENTERS, 128, generator=draws)
    rows = torch.empty(count, 128)
    for part in torch.arange(count).split(100_000):
        noise = 0.8 * torch.randn(len(part), 128, generator=draws)
        rows[part] = F.normalize(centers[group[part]] + noise, dim=1)
    xy = 9 * torch.randn(_CENTERS, 2, generator=draws)[group]
    xy += torch.randn(count, 2, generator=draws)
    names = [f"class {each % 50}" for each in group.tolist()]
    shown = Pictured(rows, [f"folder/{i:07d}.jpg" for i in range(count)], {"label": names})
    return Space(shown, xy, folder / "labels.csv", lambda data: rows[:1])


def timed(space: Space, image: int) -> float:
    """Return seconds of a search without the server."""
    start = time.perf_counter()
    space.nearest(space.shown.rows[image : image + 1], own=image)
    return time.perf_counter() - start


@contextlib.contextmanager
def served(space: Space) -> Iterator[str]:
    """Serve the explorer; yield its address."""
    with server._listen(0) as listener:
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        app = server.make_app(space, "token", host, title="benchmark")
        running = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://{host}/token/"
        finally:
            running.should_exit = True
            thread.join()


if __name__ == "__main__":
    main()
