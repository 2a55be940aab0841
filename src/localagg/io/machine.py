"""Facts and settings of the machine: processor cores, memory, the C library's allocator."""

import os

from ..errors import UserError

_LARGEST = 31 * 2**20  # bytes; glibc's threshold for blocks of their own grows up to 32 MiB


def check_process_count(option: str, count: int, always: int) -> None:
    """Raise a UserError above four processes a core, where ``always`` is fewer.

    500 workers on two cores ended in the system's out-of-memory killer.
    """
    if count > (most := max(always, 4 * cores())):
        raise UserError(
            "too-large",
            f"{option} is {count}; this machine has {cores()} cores, use at most {most}.",
        )


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Return the bytes of this machine's memory, or 0 where the system does not report them."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0


def keep_freed_memory() -> None:
    """Make glibc reuse freed blocks of up to 31 MiB; has no effect with other allocators.

    Once glibc has freed a block of some size, it keeps the memory of smaller ones. Otherwise every
    temporary's pages are returned and fetched anew, which doubles the time of views and adds a
    quarter to that of decoding.
    """
    import torch  # takes seconds; the launcher needs cores() alone

    torch.empty(_LARGEST, dtype=torch.uint8)
