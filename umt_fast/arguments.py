"""Numbers on a command line, for argparse: what is none, or out of range, is told by its value and its bound."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

N = TypeVar("N", int, float)


def whole_number_from(least: int) -> Callable[[str], int]:
    return _number(int, "whole number", lambda number: number >= least, f"below {least}")


def number_above(bound: float) -> Callable[[str], float]:
    return _number(float, "number", lambda number: number > bound, f"not above {bound:g}")  # NaN is not


def _number(convert: Callable[[str], N], kind: str, fits: Callable[[N], bool], otherwise: str) -> Callable[[str], N]:
    def parse(text: str) -> N:
        try:
            number = convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text} is no {kind}") from None
        if not fits(number):
            raise argparse.ArgumentTypeError(f"{text} is {otherwise}")
        return number

    return parse
