"""Numbers on a command line, for argparse: what is none, or out of range, is told by its value and its bound."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def whole_number_from(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text} is no whole number") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return number

    return parse


def number_above(bound: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text} is no number") from None
        if not number > bound:  # NaN is not
            raise argparse.ArgumentTypeError(f"{text} is not above {bound:g}")
        return number

    return parse
