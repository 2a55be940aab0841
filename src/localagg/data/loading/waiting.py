"""Which knob helps where a run waits for its images."""

import os

from ...config import require_resolved
from .loader import Feed
from .workers import cores

WORTH = 0.1
"""Share of the time spent waiting for data from which on a hint is given."""
_MEMORY_SHARE = 0.25  # of the machine's memory that a hint would fill with decoded images
_LARGE = 1.5  # times the view's side: from here on most of the decoded pixels are thrown away


def waiting_hint(share: float, feed: Feed) -> str | None:
    """One sentence on what would shorten the waiting, or None where it is not worth one.

    In this order: hold the images in memory (where they share one size, and fit), decode in as many
    processes as there are cores, pack the images at a smaller size.

    Args:
        share: of the time that was spent waiting for data, 0-1.
        feed: the batches that were waited for.
    """
    if share < WORTH or feed.pixels is not None:
        return None
    told = f"{share:.0%} of the time was spent waiting for data; "
    config = feed.config
    if len(feed.sizes) == 1:
        height, width = next(iter(feed.sizes))
        needed = len(feed.source) * 3 * height * width
        if needed <= _MEMORY_SHARE * _memory():
            knob = "--memory auto"
            if needed > config.memory_gb * 2**30:
                knob += f" --memory-gb {needed / 2**30 + 0.1:.1f}"
            return f"{told}hold the images in memory with {knob}."
    if config.workers < cores():
        return f"{told}read in more processes with --workers {cores()}."
    sides = sorted(min(size) for size in feed.sizes)
    if sides and sides[len(sides) // 2] > _LARGE * require_resolved(config.views.image_size):
        return (
            f"{told}all cores decode already, and images of half the size cost a quarter: shrink"
            " them once with localagg pack SRC DST --size 256, and learn from DST."
        )
    return f"{told}all cores decode already, so only a faster disk or more cores would help."


def _memory() -> int:
    """Bytes of memory that this machine has; 0 where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0
