"""Suggest an option that reduces data-loading time."""

from ...config import require_resolved
from ...io.machine import cores, memory_bytes
from .loader import Feed

HINT_FROM = 0.1
"""Share of the time spent waiting for data from which on a hint is given."""
_MEMORY_SHARE = 0.25  # of the machine's memory that a hint would fill with decoded images
_LARGE = 1.5  # times the view's side: from here on most of the decoded pixels are thrown away


def data_loading_hint(share: float, feed: Feed) -> str | None:
    """Return one sentence that names an option to reduce the waiting, or None.

    In this order: hold the images in memory (if they share one size, and fit), decode in as many
    processes as there are cores, pack the images at a smaller size.

    Args:
        share: share of the time that was spent waiting for data, 0-1.
        feed: the batches.
    """
    if share < HINT_FROM or feed.pixels is not None:
        return None
    waited = f"{share:.0%} of the time was spent waiting for data; "
    if len(feed.sizes) == 1 and feed.transform is None:
        height, width = next(iter(feed.sizes))
        needed = len(feed.source) * 3 * height * width
        if needed <= _MEMORY_SHARE * memory_bytes():
            fix = "--memory auto"
            if needed > feed.memory_gb * 2**30:
                fix += f" --memory-gb {needed / 2**30 + 0.1:.1f}"
            return f"{waited}hold the images in memory with {fix}."
    if feed.workers < cores():
        return f"{waited}read in more processes with --workers {cores()}."
    sides = sorted(min(size) for size in feed.sizes)
    if sides and sides[len(sides) // 2] > _LARGE * require_resolved(feed.views.image_size):
        return (
            f"{waited}all cores decode already, and images of half the size cost a quarter: shrink"
            " them once with localagg pack SRC DST --size 256, and train on DST."
        )
    return f"{waited}all cores decode already, so only a faster disk or more cores would help."
