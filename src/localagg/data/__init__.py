"""Images in: sources, decoding, views and batches. Knows neither the models nor the method."""

from .sources.open import Sample, Source, open_evaluation, open_images

__all__ = ["Sample", "Source", "open_evaluation", "open_images"]
