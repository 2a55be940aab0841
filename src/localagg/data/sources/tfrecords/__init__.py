"""The reference's TFRecord files."""
