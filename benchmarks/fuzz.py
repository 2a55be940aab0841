"""Do the readers of foreign files survive damaged ones?

Every case is a small valid input, changed: bytes flipped, replaced, cut, added, repeated; length
fields made extreme; a file missing or of another type. Half of them are changed inside and sealed
again with right checksums, so that the code behind the checksums is reached. A reader must return
what the valid input holds (a sealed change may be a valid input with other values), or raise
UserError. Anything else is a finding: another exception, more than 20 seconds, more than 1 GiB.
Formats without checksums cannot know of every change; their readers must return what an independent
reader does.

A case is a function of (target, number, seed): ``--only NUMBER`` repeats one and shows its error.
"""

import argparse
import contextlib
import gzip
import random
import resource
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fuzz_targets import TARGETS, Files, Target

from localagg.errors import UserError

SECONDS, BYTES = 20.0, 1 << 30


class Tally(NamedTuple):
    """What became of the cases."""

    outcomes: Counter[str]
    findings: list[str]
    slowest: float


def fuzz(target: Target, cases: range, seed: int = 0) -> Tally:
    """Read changed inputs; see the top of this file."""
    outcomes: Counter[str] = Counter()
    findings, slowest = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        expected = _read(target, target.files, Path(folder))
        for case in cases:
            kind, files = change(target, case, seed)
            start = time.perf_counter()
            try:
                found = _read(target, files, Path(folder))
                outcome = "right" if found == expected else "other values"
            except UserError:
                outcome = "refused"
            except (Exception, Hang) as error:
                outcome = "finding"
                findings.append(f"case {case} ({kind}): {type(error).__name__}: {error}")
            unnoticed = target.checked and not kind.startswith("sealed")
            if outcome == "other values" and unnoticed:
                outcome = "finding"
                findings.append(f"case {case} ({kind}): wrong values, and no error")
            outcomes[outcome] += 1
            slowest = max(slowest, time.perf_counter() - start)
    return Tally(outcomes, findings, slowest)


def change(target: Target, case: int, seed: int) -> tuple[str, Files]:
    """(what was done, files) of a case."""
    draw = random.Random(f"{seed} {case}")
    if target.sealed and case % 2:
        parts, build = draw.choice(target.sealed)
        parts = list(parts)
        spot = draw.randrange(len(parts))
        parts[spot], kind = _mutated(parts[spot], draw)
        return f"sealed, {kind}", build(parts)
    files = dict(target.files)
    name = draw.choice(sorted(files))
    if draw.random() < 0.05:
        kind = draw.choice(sorted(_OTHER))
        other = _OTHER[kind](files, name, draw)
        if other is None:
            del files[name]
        else:
            files[name] = other
        return kind, files
    files[name], kind = _mutated(files[name], draw)
    return kind, files


def _mutated(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    kinds = draw.choices(sorted(_MUTATIONS), k=draw.choice((1, 1, 1, 2, 3)))
    for kind in kinds:
        at = draw.randrange(len(data) + 1)
        # Half of the changes lie near one of the ends, where headers and footers are.
        if draw.random() < 0.5:
            at = draw.choice((at % 64, len(data) - at % 64))
        data = _MUTATIONS[kind](data, max(0, min(at, len(data))), draw)
    return data, " and ".join(kinds)


def _varint(value: int) -> bytes:
    digits = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes(digit | 0x80 for digit in digits[:-1]) + bytes(digits[-1:])


_EXTREMES = [0, 1, 2**7, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
_LENGTHS = [
    *(_varint(value) for value in _EXTREMES),
    *(struct.pack("<Q", value) for value in _EXTREMES),
    *(struct.pack("<I", value) for value in _EXTREMES if value < 2**32),
    b"\xff" * 9 + b"\x7f",
    b"\x80" * 12,
    b"\xff" * 40,
]


def _overwritten(data: bytes, at: int, piece: bytes) -> bytes:
    return data[:at] + piece + data[at + len(piece) :]


def _length(data: bytes, at: int, draw: random.Random) -> bytes:
    piece = draw.choice(_LENGTHS)
    replaced = draw.choice((len(piece), 1, 2))
    return data[:at] + piece + data[at + replaced :]


_MUTATIONS: dict[str, Callable[[bytes, int, random.Random], bytes]] = {
    "bit flipped": lambda data, at, draw: _overwritten(
        data, at, bytes([byte ^ 1 << draw.randrange(8) for byte in data[at : at + 1]])
    ),
    "byte replaced": lambda data, at, draw: _overwritten(
        data, at, draw.choice((b"\0", b"\xff", b"\x7f", b"\x80", draw.randbytes(1)))
    ),
    "bytes replaced": lambda data, at, draw: _overwritten(
        data, at, draw.randbytes(draw.randint(2, 32))
    ),
    "length field": _length,
    "truncated": lambda data, at, draw: data[:at],
    "beginning cut": lambda data, at, draw: data[at:],
    "bytes removed": lambda data, at, draw: data[:at] + data[at + draw.randint(1, 64) :],
    "bytes added": lambda data, at, draw: (
        data[:at] + draw.randbytes(draw.randint(1, 64)) + data[at:]
    ),
    "piece repeated": lambda data, at, draw: (
        data[:at] + data[at : at + draw.randint(1, 600)] * draw.randint(2, 50) + data[at:]
    ),
    "zeros": lambda data, at, draw: _overwritten(data, at, bytes(draw.randint(1, 600))),
}
_OTHER: dict[str, Callable[[Files, str, random.Random], bytes | None]] = {
    "file missing": lambda files, name, draw: None,
    "empty file": lambda files, name, draw: b"",
    "text file": lambda files, name, draw: b"not what you think\n" * draw.randint(1, 20),
    "noise": lambda files, name, draw: draw.randbytes(draw.randint(1, 4000)),
    "zeros only": lambda files, name, draw: bytes(draw.randint(1, 4000)),
    "gzip": lambda files, name, draw: gzip.compress(files[name]),
    "another of the files": lambda files, name, draw: files[draw.choice(sorted(files))],
}


class Hang(BaseException):
    """A case took too long; no reader may swallow it."""


def _read(target: Target, files: Files, folder: Path) -> Any:
    for old in folder.iterdir():
        old.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with limits():
        return target.read(folder)


@contextlib.contextmanager
def limits(seconds: float = SECONDS, size: int = BYTES) -> Iterator[None]:
    """Inside, the process may take so many seconds, and so many bytes more than it has."""

    def late(*_: object) -> None:
        raise Hang(f"took more than {seconds} seconds")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def main() -> None:
    import report

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--cases", type=int, default=20_000, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat one case of the first target")
    options = parser.parse_args()
    if options.only is not None:
        target = TARGETS[options.target[0]]()
        kind, files = change(target, options.only, options.seed)
        print(kind)
        with tempfile.TemporaryDirectory() as folder:
            print(_read(target, files, Path(folder)))
        return
    rows, findings = [], []
    for name in options.target:
        tally = fuzz(TARGETS[name](), range(options.cases), options.seed)
        counts = [tally.outcomes[kind] for kind in ("right", "other values", "refused", "finding")]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append([name, f"{options.cases:,}", *counts, f"{tally.slowest:.2f}", f"{peak:.0f}"])
        findings += [f"{name}, {finding}" for finding in tally.findings]
    report.write(
        "fuzz",
        "Readers of foreign files on damaged input",
        [
            "reader",
            "cases",
            "right",
            "other values (sealed changes)",
            "refused with our own error",
            "findings",
            "slowest, s",
            "peak of the process, MB",
        ],
        rows,
        "\n".join(f"- {finding}" for finding in findings[:50]) or "No findings.",
    )
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
