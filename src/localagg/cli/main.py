"""Run a command line and return its exit status. Heavy imports wait until a command runs.

Results go to stdout and to ``--json FILE``, progress and messages to stderr. Exit statuses: 0 done;
1 internal error, please report it; 2 invalid use or environment error (disk full, no permission),
one sentence with the fix; 75 saved and stopped by SIGTERM, SIGUSR1 or SIGHUP; 130 stopped by
Ctrl-C; 141 the reader of a pipe left. In a job of several processes one reports the error, and all
exit with its status.
"""

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .. import __version__
from ..errors import (
    Interrupted,
    ReportedElsewhere,
    UserError,
    first_line,
    printable,
    suggest,
)
from ..io.files import disk_advice, reason_of
from .commands import COMMANDS
from .outputs import check_outputs
from .parse import parse

_QUICK = ("recipes", "results", "inspect")  # print their own first line at once, or end


def main(argv: list[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: words after the program's name. Default: those of this process.

    Returns:
        The exit status.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell, as in ``localagg results RUN >&-``
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):  # of a terminal that cannot show every name
            stream.reconfigure(errors="backslashreplace")
    try:
        with _convert_resource_errors():
            _run_command(list(sys.argv[1:] if argv is None else argv))
            sys.stdout.flush()
    except UserError as error:
        return _report(str(error), 2)
    except Interrupted as stopped:
        return _report(str(stopped), stopped.status)
    except ReportedElsewhere as ended:
        return ended.status
    except KeyboardInterrupt:
        if argv is None:  # a program that is about to end; the next Ctrl-C needs no traceback
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        return _report("stopped.", 130)
    except BrokenPipeError:  # the reader left, as in ``localagg results RUN | head``
        _discard(sys.stdout, sys.stderr)
        return 128 + 13  # the status of a program that SIGPIPE ends
    except OSError as error:  # disk full, no permission
        if error.filename is None and error.errno == errno.ENOSPC:
            _discard(sys.stdout)
            return _report("The disk of the output is full; free some space.", 2)
        if error.filename is None:
            raise
        return _report(
            f"'{error.filename}': {reason_of(error)}; {disk_advice(error)}, or name another.", 2
        )
    return 0


_NO_MEMORY = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")
_MEMORY = (
    "There is not enough memory for this; choose a smaller --image-size, --batch-size or network."
)


@contextlib.contextmanager
def _convert_resource_errors() -> Iterator[None]:
    """Name a worker's death and missing memory; torch is imported only for an error."""
    try:
        yield
    except MemoryError:
        raise UserError("too-large", _MEMORY) from None
    except ImportError as error:
        if not any(text in str(error) for text in ("failed to map", "cannot allocate memory")):
            raise
        raise UserError(
            "too-large",
            f"A library does not fit the memory that this process may have ({first_line(error)});"
            " raise its limit (ulimit -v).",
        ) from None
    except RuntimeError as error:
        if any(text in str(error) for text in _NO_MEMORY):
            raise UserError("too-large", _MEMORY) from None
        from ..data.loading.workers import convert_worker_death

        with convert_worker_death():
            raise


def _discard(*streams: IO[str]) -> None:
    """Let streams end in nothing, also at Python's own flush at exit."""
    with open(os.devnull, "w") as devnull:
        for stream in streams:
            os.dup2(devnull.fileno(), stream.fileno())


def _is_first_process() -> bool:
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID"))


def _report(message: str, status: int) -> int:
    with contextlib.suppress(OSError):  # its reader left, or its disk is full as well
        print(f"localagg: {printable(message)}", file=sys.stderr, flush=True)
    return status


def _run_command(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return
    name, *rest = words
    if name in ("-V", "--version"):
        print(f"localagg {__version__}")
        return
    if name not in COMMANDS:
        listed = ", ".join(COMMANDS)
        raise UserError(
            "option-unknown",
            f"There is no command '{name}'; choose from {listed}.{suggest(name, COMMANDS)}",
        )
    kind, run = COMMANDS[name]
    options, file = parse(kind, name, rest)
    check_outputs(options, file)
    if name not in _QUICK and "torch" not in sys.modules and _is_first_process():
        print(f"localagg {name}: starting", file=sys.stderr, flush=True)  # torch takes seconds
    result = run(options)
    if file is not None and result is not None:
        from ..checkpoint import write_json

        write_json(Path(file), result)


def _help() -> str:
    width = max(map(len, COMMANDS))
    about = {name: (kind.__doc__ or "").splitlines()[0] for name, (kind, _) in COMMANDS.items()}
    lines = [f"  {name:{width}}  {text}" for name, text in about.items()]
    return "\n".join(
        [
            "localagg learns an embedding of images without labels.",
            "",
            "usage: localagg COMMAND ...",
            "",
            *lines,
            "",
            "localagg COMMAND --help explains each. Start with: localagg demo",
        ]
    )
