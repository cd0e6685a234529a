"""What --help says: every flag has a text."""

from __future__ import annotations

import argparse
import ast
import importlib
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
PROGRAMS = sorted(
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    for folder in ("umt_fast", "train", "benchmarks")
    for path in (REPOSITORY / folder).rglob("*.py")
    if "ArgumentParser(" in (text := path.read_text()) and '__name__ == "__main__"' in text
    if path.name != "evaluate.py"  # its flags are settings
)
SETTINGS = [
    *sorted((REPOSITORY / "umt_fast" / "config").glob("*.py")),
    *sorted((REPOSITORY / "train").glob("eval*.py")),
]


class Parser(Exception):
    """The parser of a program, caught when it was about to read the command line."""


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_flag_of_a_program_has_a_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = importlib.import_module(name)

    def catch(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        raise Parser(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", catch)
    monkeypatch.setattr("sys.argv", ["x"])
    with pytest.raises(Parser) as caught:
        program.main()
    parser = caught.value.args[0]
    assert parser.prog == "python -m " + name.removesuffix(".__main__")
    assert [action.dest for action in parser._actions if not action.help] == []


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_every_setting_has_a_text(path: Path) -> None:
    """tyro shows the string below a field; a section shows the docstring of its class."""
    bare = []
    for found in ast.walk(ast.parse(path.read_text())):
        if isinstance(found, ast.ClassDef):
            for field, after in zip(found.body, [*found.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign) and not ast.unparse(field.annotation).endswith(
                    ("Config", "Objective")
                ):
                    documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    bare += [] if documented else [f"{found.name}.{ast.unparse(field.target)}"]
    assert bare == []


@pytest.mark.parametrize(
    ("name", "work", "arguments"),
    [
        ("umt_fast.evaluation.search", "_run", ["a dog", "--checkpoint", "x.pth", "--videos", "x"]),
        ("umt_fast.evaluation.probe", "read_features", ["knn", "--train", "x", "--test", "x"]),
        ("umt_fast.evaluation.features", "_extract", ["--checkpoint", "x.pth", "--data", "x", "--out", "x"]),
    ],
)
def test_ctrl_c_ends_a_program_without_a_traceback(
    name: str, work: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    program = importlib.import_module(name)
    monkeypatch.setattr(program, work, interrupt)
    with pytest.raises(SystemExit) as caught:
        program.main(arguments)
    assert caught.value.code == 130
