"""Options of a run: dataclasses, their checks, and access to their fields by name."""

from .checks import (
    check_arguments,
    check_numbers,
    check_one_of,
    check_options,
    check_temperature,
    is_integer,
)
from .effects import check_effects
from .fields import (
    check_names,
    flag,
    from_dict,
    option_names,
    option_value,
    override,
    removed_options,
    require_resolved,
    to_dict,
)
from .options import (
    AdaptConfig,
    EncoderConfig,
    ObjectiveConfig,
    PretrainConfig,
    TransferConfig,
    ViewConfig,
)
from .type_checks import check_argument_types

__all__ = [
    "AdaptConfig",
    "EncoderConfig",
    "ObjectiveConfig",
    "PretrainConfig",
    "TransferConfig",
    "ViewConfig",
    "check_argument_types",
    "check_arguments",
    "check_effects",
    "check_names",
    "check_numbers",
    "check_one_of",
    "check_options",
    "check_temperature",
    "flag",
    "from_dict",
    "is_integer",
    "option_names",
    "option_value",
    "override",
    "removed_options",
    "require_resolved",
    "to_dict",
]
