"""Images: sources, decoding, views and batches. Independent of the models and the method."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .sources.open import Sample, Source, open_evaluation, open_images

__all__ = ["Sample", "Source", "open_evaluation", "open_images"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: torch takes seconds, and commands start without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .sources import open as opening

    return getattr(opening, name)
