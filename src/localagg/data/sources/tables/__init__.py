"""Tables of encoded images."""
