"""The command line: :mod:`main` runs one of :mod:`commands`, each in a module of its name."""

from .main import main

__all__ = ["main"]
