"""From encoded bytes to views."""
