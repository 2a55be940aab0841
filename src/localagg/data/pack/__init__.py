"""Copy any source into one folder of large files."""
