"""An entry of results.json."""

from typing import Any

ENTRY: dict[str, Any] = {
    "measure": "knn",
    "protocol": "held-out images against the memory bank",
    "values": {"knn1": 0.25, "knn200": 0.5},
    "data": "pictures",
    "fingerprint": "aa",
    "images": 12,
}


def entry(**changes: Any) -> dict[str, Any]:
    """ENTRY with some fields changed."""
    return {**ENTRY, **changes}
