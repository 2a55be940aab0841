"""``make gpu``: time limits, order, and results as they come, with stand-ins for its parts."""

import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest
import torch

import report

ROOT = Path(__file__).parents[1]


def part(name, code, limit=20.0):
    return gpu.Part(name, [sys.executable, "-c", code], limit)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    return tmp_path


def test_parts_run_in_order_and_a_slow_or_failing_one_leaves_the_rest(folders):
    seen = []
    slow = "import time; print('begun', flush=True); time.sleep(60)"
    outcomes = gpu.run_parts(
        [
            part("slow", slow, limit=3.0),
            part("failing", "print('one | two'); raise SystemExit(3)"),
            part("good", "import localagg; print(localagg.__file__)"),
        ],
        60,
        lambda found: (seen.append(len(found)), gpu.write(found)),
    )
    assert seen == [1, 2, 3]
    assert [each.ended for each in outcomes] == [
        "ended after 3 s",
        "failed with status 3",
        "passed",
    ]
    assert outcomes[0].last == "begun"  # what it printed before its end is kept
    assert outcomes[0].seconds < 20
    assert outcomes[2].last.startswith(str(ROOT / "src"))
    table = (folders / "results" / "gpu.md").read_text()
    assert [name in table for name in ("slow", "failing", "good", "one / two")] == [True] * 4


def test_workers_of_a_part_end_with_it(folders):
    mark = folders / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    gpu.run_parts([part("parent", code)], 20, lambda found: None)
    time.sleep(3.5)
    assert not mark.exists()


def test_all_parts_together_keep_to_the_limit():
    begun = [part(str(n), "import time; time.sleep(60)") for n in range(3)]
    outcomes = gpu.run_parts(begun, 1.0, lambda found: None)
    assert [each.ended for each in outcomes] == ["ended after 1 s", "no time", "no time"]
    assert sum(each.limit for each in gpu.parts()) <= gpu.SECONDS
    assert "tests/training/test_gpu.py" in gpu.parts()[0].words


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_sentence_and_status_2():
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""
