"""Commands that read and write weights of other programs."""
