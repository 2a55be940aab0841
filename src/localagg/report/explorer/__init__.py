"""Pages that open offline: one HTML file each, everything inside."""
