"""The processes of a job: how they start, communicate and end."""

from .collectives import World
from .differentiable import gather_rows

__all__ = ["World", "gather_rows"]
