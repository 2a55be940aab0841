"""Files, locks, tensor files and the console."""
