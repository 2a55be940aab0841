"""Does a run that dies at random moments end as if it never had?

A small job (IR, then LA on digits) is killed at random moments and gone on with until it has
finished; its weights, optimizer, bank, clusters and metrics.jsonl must be those of an unbroken run,
bit for bit. It writes a checkpoint every step, so that many kills fall into a write. A kill is
SIGKILL of the whole job, of its main process alone, or of one of its workers or ranks; or SIGTERM,
after which it has to save and end by itself. Then the disk fills under other jobs at random
moments: each must end with one sentence and status 2, leave a checkpoint that loads, and go on when
there is room.

``--ranks 2`` runs every other job on two processes. The numbers of a job's seed are drawn from
``--seed`` and its number alone, and printed; ``--only N`` repeats one.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file

import report

JOB = (
    "digits --data digits --epochs 4 --ir-epochs 2 --width 4 --blocks 1 --neighbors 64"
    " --clusters 10 20 --kmeans-iterations 3 --batch-size 100 --eval-every 2 --log-every 1"
    " --memory never --device cpu --precision 32-true --warm-clusters"
)
LIMIT = 300  # seconds for a job to end by itself; beyond, it hangs
DISK = "64m"
COLUMNS = (
    *("kind", "jobs", "strikes", "of them in a write", "corrupt checkpoints", "hung"),
    *("one clear sentence", "bit-identical at the end"),
)


def start(run: Path, ranks: int, *options: str) -> subprocess.Popen:
    """Begin a job, or go on with it; it leads its own process group."""
    command = [sys.executable, "-m", "localagg", "pretrain"]
    if (run / "config.json").exists():
        command += ["--resume", str(run)]
    else:
        command += [*JOB.split(), "--out", str(run), *options]
    if ranks > 1:
        command += ["--processes", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=pipe,
        text=True,
        start_new_session=True,
        env=environment,
    )


def end(process: subprocess.Popen, limit: float = LIMIT) -> tuple[int | None, str]:
    """Status and messages; the status is None where it had to be killed."""
    try:
        _, told = process.communicate(timeout=limit)
        return process.returncode, told
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[1]


def children(pid: int) -> list[int]:
    """All processes below one."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *children(int(child))]
    return found


def kill(process: subprocess.Popen, draws: random.Random) -> str:
    """Strike in one of four ways; its name."""
    way = draws.choice(("all", "main alone", "a child", "SIGTERM"))
    below = sorted(children(process.pid))
    if way == "a child" and not below:
        way = "main alone"
    if way == "all":
        os.killpg(process.pid, signal.SIGKILL)
    elif way == "a child":
        os.kill(draws.choice(below), signal.SIGKILL)
    else:
        os.kill(process.pid, signal.SIGKILL if way == "main alone" else signal.SIGTERM)
    return way


def wait(process: subprocess.Popen, run: Path, seconds: float, draws: random.Random) -> None:
    """To a random moment: of the whole job, of its learning, or of the next checkpoint's write."""
    where = draws.choice(("job", "learning", "write", "write"))
    if where != "job":
        while process.poll() is None and not (run / "config.json").exists():
            time.sleep(0.002)
    until = time.monotonic() + draws.uniform(0, seconds)
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    if where == "write":
        while process.poll() is None and not writes(run):
            time.sleep(0.0002)
        time.sleep(draws.uniform(0, 0.02))


def writes(run: Path) -> bool:
    """Whether a checkpoint is half written."""
    return any((run / "checkpoints").glob(".step-*.tmp"))


def newest(run: Path) -> Path | None:
    return max((run / "checkpoints").glob("step-*"), default=None)


def whole(run: Path) -> bool:
    """Whether the newest checkpoint of a run loads, where it has one."""
    folder = newest(run)
    if folder is None:
        return True
    try:
        for file in folder.glob("*.safetensors"):
            load_file(file)
        torch.load(folder / "optimizer.pt", weights_only=True)
        json.loads((folder / "progress.json").read_text())
        return {"model.safetensors", "progress.json"} <= {file.name for file in folder.iterdir()}
    except Exception as error:
        print(f"  {folder} is damaged: {error}", flush=True)
        return False


def differences(run: Path, unbroken: Path) -> list[str]:
    """What is not the same, bit for bit, in two finished runs."""
    one, other = newest(run), newest(unbroken)
    if one is None or other is None or one.name != other.name:
        return ["steps"]
    found = []
    for file in other.glob("*.safetensors"):
        first, second = load_file(one / file.name), load_file(file)
        if first.keys() != second.keys():
            found.append(file.stem)
        found += [name for name in first if not torch.equal(first[name], second[name])]
    states = [torch.load(f / "optimizer.pt", weights_only=True)["state"] for f in (one, other)]
    for key, state in states[1].items():
        if not torch.equal(states[0][key]["momentum_buffer"], state["momentum_buffer"]):
            found.append(f"momentum {key}")
    if (run / "metrics.jsonl").read_bytes() != (unbroken / "metrics.jsonl").read_bytes():
        found.append("metrics.jsonl")
    return found


def killed(number: int, seed: int, ranks: int, unbroken: Path, seconds: float, place: Path):
    """One job, struck one to three times. Returns counts of what happened."""
    draws, run, told = random.Random(seed * 1000 + number), place / f"killed-{number}", []
    counts = Counter(jobs=1)
    for _ in range(draws.randint(1, 3)):
        process = start(run, ranks, "--checkpoint-seconds", "0")
        wait(process, run, seconds, draws)
        if process.poll() is not None:
            end(process)
            break
        way = kill(process, draws)
        status, _ = end(process)
        counts["strikes"] += 1
        counts["in a write"] += writes(run)
        counts["corrupt"] += not whole(run)
        counts["hung"] += status is None
        found = newest(run)
        told.append(f"{way} -> {status} at {found.name if found else 'nothing'}")
    status, words = end(start(run, ranks))
    counts["hung"] += status is None
    unlike = differences(run, unbroken) if status == 0 else [f"status {status}: {words[-300:]}"]
    counts["identical"] += not unlike
    outcome = f"unlike: {unlike}" if unlike else "identical"
    seeded = f"job {number}, seed {seed * 1000 + number}, {ranks} rank(s)"
    print(f"{seeded}: {'; '.join(told)}; {outcome}", flush=True)
    return counts


def filled(number: int, seed: int, ranks: int, unbroken: Path, seconds: float, place: Path):
    """One job under which the disk fills; counts of nothing where it had ended before."""
    draws, run = random.Random(seed * 1000 + 500 + number), place / f"filled-{number}"
    counts, filler = Counter(jobs=1), place / "filler"
    process = start(run, ranks, "--checkpoint-seconds", "0")
    while process.poll() is None and newest(run) is None:
        time.sleep(0.002)
    wait(process, run, seconds * 0.7, draws)
    fill(filler)
    status, words = end(process)
    if status == 0 and not differences(run, unbroken):
        filler.unlink()
        print(f"full disk {number}: had ended before", flush=True)
        return Counter()
    counts["hung"] += status is None
    lines = [line for line in words.splitlines() if line.startswith("localagg:")]
    clear = status == 2 and len(lines) == 1 and "No space left on device" in lines[0]
    clear = clear and "Traceback" not in words
    counts["clear"] += clear
    counts["corrupt"] += not whole(run)
    counts["left half"] += writes(run)
    found = newest(run)
    filler.unlink()
    again, words_again = end(start(run, ranks))
    unlike = differences(run, unbroken) if again == 0 else [f"status {again}: {words_again[-300:]}"]
    counts["identical"] += not unlike
    at = found.name if found else "nothing"
    print(f"full disk {number}, seed {seed * 1000 + 500 + number}: status {status} at {at}", end="")
    print("" if clear else f", NOT CLEAR: {words[-600:]}", end="")
    print(f"; unlike: {unlike}" if unlike else "; identical", flush=True)
    return counts


def fill(path: Path) -> None:
    """Write until nothing more is taken."""
    with open(path, "wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def on_a_small_disk(options: argparse.Namespace, unbroken: Path, seconds: float) -> Counter:
    """The jobs under which the disk fills, in a name space of their own with a small tmpfs."""
    with tempfile.TemporaryDirectory() as place:
        words = [sys.executable, __file__, "--full", str(options.full), "--seed", str(options.seed)]
        words += ["--disk", place, str(unbroken), str(seconds)]
        mount = f'mount -t tmpfs -o size={DISK} none "$0" && exec "$@"'
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", mount, place, *words], stdout=subprocess.PIPE, text=True
        )
    told, _, counted = done.stdout.rpartition("COUNTED ")
    print(told, end="", flush=True)
    return Counter(json.loads(counted))


def unbroken_run(place: Path, ranks: int) -> tuple[Path, float]:
    """A run that nothing happens to, and the seconds that it learns."""
    run = place / f"unbroken-{ranks}"
    process = start(run, ranks)
    while process.poll() is None and not (run / "config.json").exists():
        time.sleep(0.002)
    begun = time.monotonic()
    status, words = end(process)
    if status != 0:
        raise SystemExit(f"The unbroken run ended with {status}: {words}")
    return run, time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50, help="jobs that are killed")
    parser.add_argument("--full", type=int, default=10, help="jobs that the filling disk ends")
    parser.add_argument("--ranks", type=int, default=1, help="processes of every other job")
    parser.add_argument("--at-once", type=int, default=2, help="killed jobs at the same time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one killed job to repeat")
    parser.add_argument("--disk", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.disk:
        place, unbroken, seconds = options.disk
        counts, n = Counter(jobs=0), 0
        while counts["jobs"] < options.full:
            counts += filled(n, options.seed, 1, Path(unbroken), float(seconds), Path(place))
            n += 1
        print("COUNTED", json.dumps(counts))
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        unbroken = {ranks: unbroken_run(place, ranks) for ranks in {1, options.ranks}}
        kinds: dict[int, Counter] = {ranks: Counter() for ranks in unbroken}
        numbers = range(options.runs) if options.only is None else [options.only]

        def strike(number: int) -> None:
            ranks = options.ranks if number % 2 else 1
            kinds[ranks] += killed(number, options.seed, ranks, *unbroken[ranks], place)

        with ThreadPoolExecutor(options.at_once) as pool:
            list(pool.map(strike, numbers))
        disk = on_a_small_disk(options, *unbroken[1]) if options.full else Counter()
    tell(options, kinds, disk)


def tell(options: argparse.Namespace, kinds: dict[int, Counter], disk: Counter) -> None:
    rows = [
        [
            f"killed, {ranks} process{'es' * (ranks > 1)}",
            *(found[name] for name in ("jobs", "strikes", "in a write", "corrupt", "hung")),
            "",
            f"{found['identical']} of {found['jobs']}",
        ]
        for ranks, found in sorted(kinds.items())
    ]
    if disk:
        clear, same = (f"{disk[name]} of {disk['jobs']}" for name in ("clear", "identical"))
        counted = (disk["corrupt"], disk["hung"])
        rows.append(["disk full", disk["jobs"], "", "", *counted, clear, same])
    report.write(
        "chaos",
        "Jobs that die at random moments, and go on",
        COLUMNS,
        rows,
        f"Seed {options.seed}: job n draws from {options.seed * 1000} + n, under a full disk from"
        f" {options.seed * 1000 + 500} + n. Compared: weights, batch-norm statistics, momenta,"
        " bank, clusters and metrics.jsonl, with an unbroken run of as many processes.",
    )


if __name__ == "__main__":
    main()
