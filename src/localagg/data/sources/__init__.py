"""From a URI to encoded images with a stable index."""
