"""Any source into one folder of large files."""
