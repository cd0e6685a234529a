"""Checks and the error class that all settings classes use."""

from __future__ import annotations

import math
from typing import Any

from umt_fast.errors import RunError


class ConfigError(RunError, ValueError):
    """A setting has an invalid value."""


def check_divides(owner: str, name: str, value: int, by_name: str, by: int) -> None:
    if by < 1 or value < 1 or value % by:
        raise ConfigError(f"{owner}: {name} = {value} is not a positive multiple of {by_name} = {by}")


def check_at_least(section: Any, name: str, **lowest: float) -> None:
    """Raise ConfigError unless each named setting of a section is None or finite and at least the number given."""
    for key, low in lowest.items():
        value = getattr(section, key)
        if value is not None and not low <= value < math.inf:
            raise ConfigError(f"{name}.{key} = {value}: must be a finite number >= {low:g}")


def check_share(key: str, *values: float, below_one: bool = False) -> None:
    for value in values:
        if not (0 <= value < 1 or (value == 1 and not below_one)):
            raise ConfigError(f"{key} = {value}: must be in [0, 1{')' if below_one else ']'}")
