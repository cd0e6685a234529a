"""The function of the user that `mask.source` names."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from umt_fast.config import ConfigError


class Source:
    """Calls the function `module:function` and checks what it returns. Raises ConfigError if there is none."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._function = _load(name)

    def __call__(self, shape: tuple[int, ...], *inputs: Any) -> Tensor:
        """The function's result without its history. Raises ConfigError unless it is a finite float tensor of `shape`.

        Values are looked at on the CPU only: on a GPU, the step would wait for them.
        """
        found = self._function(*inputs)
        if not isinstance(found, Tensor) or tuple(found.shape) != shape or not found.is_floating_point():
            got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(f"mask.source = {self.name} returned {got}; return a float tensor {list(shape)}")
        if found.device.type == "cpu" and not bool(found.isfinite().all()):
            raise ConfigError(f"mask.source = {self.name} returned values that are not finite")
        return found.detach()


def _load(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"mask.source = {name}: {error}") from None
    if not callable(found):
        raise ConfigError(f"mask.source = {name} is not a function")
    return found
