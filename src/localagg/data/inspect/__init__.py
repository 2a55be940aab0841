"""The contents and problems of a source, before training."""
