"""A pack that is killed at any moment and run again writes the same folder."""

import multiprocessing
import os
import random
import signal
import time
from functools import partial

import pytest
from killed_child import FORK, run_in_child
from packed_folder import contents

from localagg.data.pack import process_images
from localagg.data.pack.pack_dataset import pack

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def imported(pictures, tmp_path_factory):
    """Import the modules of a pack here: otherwise most moments of a child are imports."""
    for format in ("arrow", "tfrecord", "webdataset"):
        folder = tmp_path_factory.mktemp("once") / format
        pack(str(pictures / "val"), folder, format=format, verify=True)


def child(uri, folder, format, workers, killed_in=None):
    """Pack in a process of its own; return (exit code, calls)."""
    options = {"format": format, "shard_bytes": 15_000, "workers": workers, "verify": True}
    return run_in_child(partial(pack, uri, folder, **options), killed_in=killed_in)


@pytest.mark.parametrize(("workers", "kills"), [(0, 10), (2, 3)])
@pytest.mark.parametrize("format", ["arrow", "tfrecord", "webdataset"])
def test_kills_at_random_moments_leave_the_same_bytes(pictures, tmp_path, format, workers, kills):
    uri, draw = str(pictures / "val"), random.Random(format)
    status, calls = child(uri, tmp_path / "whole", format, workers)
    assert status == 0
    whole = contents(tmp_path / "whole")
    assert len(whole) > 3
    killed = resumed = 0
    for kill in range(kills):
        folder, unfinished = tmp_path / f"{kill}", tmp_path / f"{kill}.partial"
        moment = draw.randrange(1, calls * 99 // 100)
        status, _ = child(uri, folder, format, workers, moment)
        assert status in (0, -signal.SIGKILL)  # 0: progress is shown by the clock, in fewer calls
        killed += status != 0
        resumed += len(list(unfinished.glob("state/**/*.sha256"))) > 0
        if not folder.exists():
            assert child(uri, folder, format, workers)[0] == 0
            assert not unfinished.exists()
        assert contents(folder) == whole, f"killed in call {moment:,} of {calls:,}"
    assert killed > kills / 2
    assert resumed >= kills // 3  # or the moments say little


def test_workers_end_with_a_killed_parent(pictures, tmp_path):
    """They write into pipes that nobody empties anymore."""

    def main(pids):
        def stop_reading(self, chunks, results):
            next(results)
            pids.put([child.pid for child in multiprocessing.active_children()])
            time.sleep(600)

        large = process_images.ProcessedImage(bytes(10**6), 0, "", None, False, False, b"")
        process_images.FileSummary.iterate_records = stop_reading
        process_images.process_image = lambda *_, **__: large
        pack(str(pictures), tmp_path / "packed", workers=2)

    pids = FORK.SimpleQueue()
    process = FORK.Process(target=main, args=(pids,))
    process.start()
    workers = pids.get()
    assert len(workers) == 2
    assert all(map(_runs, workers))
    process.kill()
    process.join()
    deadline = time.monotonic() + 30
    while any(map(_runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [pid for pid in workers if _runs(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def _runs(pid):
    """Return whether a process exists and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_pack_that_is_killed_again_and_again_comes_to_an_end(pictures, tmp_path):
    uri, draw = str(pictures / "train"), random.Random(1)
    _, calls = child(uri, tmp_path / "whole", "arrow", 0)
    kills = 0
    while not (tmp_path / "packed").exists():
        # Opening the images is nearly a half of the calls.
        moment = draw.randrange(calls * 2 // 5, calls * 3 // 5)
        status, _ = child(uri, tmp_path / "packed", "arrow", 0, moment)
        kills += status == -signal.SIGKILL
        assert kills < 40
    assert kills > 1
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")
