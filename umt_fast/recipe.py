"""Recipe -> flags -> settings: the flags of a TOML recipe, followed by those of the command line, which override them.

One call of tyro parses both, so types, choices and suggestions are the same in a recipe and on the command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from umt_fast.config import CLASSIFIERS, STUDENTS, TEACHERS, TEXTS, ConfigError

T = TypeVar("T")

PRESETS: dict[str, dict[str, Any]] = {
    "student": STUDENTS,
    "teacher": TEACHERS,
    "classifier": CLASSIFIERS,
    "text": TEXTS,
}
"""Named sizes by section: `preset = NAME` in a recipe, `--SECTION.preset NAME` on the command line."""

_MODEL: tuple[str, ...] = ("attention", "compile", "recompute", "teacher_precision", "student_precision")
_MODEL += ("least_teacher_cosine", "least_student_cosine")
RENAMED = {
    "train.masks_per_clip": "mask.masks_per_clip",
    "train.cuda_graph": "compute.cuda_graph",
    "run.precision": "compute.precision",
    **{f"model.{name}": f"compute.{name}" for name in _MODEL},
}
"""Settings of version 0.1 by their old names, which work until version 0.3."""

LARGEST_RECIPE = 1 << 20
"""Bytes; a larger file is refused."""


def load_recipe(kind: type[T], path: Path) -> T:
    """Read a TOML recipe as an instance of `kind`.

    Tables are sections; `preset = NAME` starts a section from a named size. Raises ConfigError with file, line and
    key.
    """
    return parse(kind, path, [])


def parse(kind: type[T], path: Path, flags: Sequence[str], prog: str = "", description: str = "") -> T:
    """Read a recipe as an instance of `kind`; the command line's `flags` override it.

    Raises ConfigError for a mistake in the recipe. A mistake in the flags is printed and exits with status 2; --help
    prints the settings with the recipe's values and exits with status 0.
    """
    import tyro

    text = _read(path)
    of_recipe = _current_names(list(_recipe_flags(kind, path, text)))
    flags = _current_names(list(_expand_presets(flags)))
    with contextlib.suppress(SystemExit), _captured():
        return tyro.cli(kind, args=[*of_recipe, *flags])
    # Find out whether the mistake is in the recipe or in the flags. Correct settings need only the one call above.
    default = _read_alone(kind, path, text, of_recipe)
    return tyro.cli(kind, args=flags, default=default, prog=prog or None, description=description or None)


def read_key(path: Path, key: str) -> Any:
    """Value of a top-level key of a recipe; None if it is missing. Raises ConfigError."""
    try:
        return tomllib.loads(_read(path)).get(key)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise ConfigError(f"{path}: {error}") from None


def _read(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_RECIPE + 1)
        if len(content) > LARGEST_RECIPE:
            raise ConfigError(f"{path}: more than {LARGEST_RECIPE} bytes, which is not a recipe")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save the recipe as UTF-8") from None


def _recipe_flags(kind: type, path: Path, text: str) -> Iterator[str]:
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise ConfigError(f"{path}: {error}") from None
    known = [field.name for field in dataclasses.fields(kind)]
    for name, value in tables.items():
        if name not in known:  # tyro has flags of its own, such as --help, which a recipe must not reach
            if not any(old.startswith(f"{name}.") for old in RENAMED):
                where = _line(text, "", name) or _line(text, name, "")
                raise ConfigError(f"{path}{where}: no setting or section {name!r}; there are {', '.join(known)}")
            if not isinstance(value, dict):
                raise ConfigError(f"{path}{_line(text, '', name)}: {name} = {value!r} is not a section")
        if isinstance(value, dict) and "preset" in value:
            preset = value.pop("preset")
            try:
                yield from _preset_flags(name, preset)
            except ConfigError as error:
                raise ConfigError(f"{path}{_line(text, name, 'preset')}: {error}") from None
        yield from _flags(name, value)


def _flags(name: str, value: Any) -> Iterator[str]:
    """The flags of a TOML value, or of all values of a table."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flags(f"{name}.{key}", inner)
    elif isinstance(value, bool):
        section, dot, key = name.rpartition(".")
        yield f"--{name}" if value else f"--{section}{dot}no-{key}"
    elif isinstance(value, list | tuple):
        yield f"--{name}"
        yield from map(str, value)
    else:
        yield f"--{name}={value}"


def _preset_flags(section: str, preset: Any) -> Iterator[str]:
    names = PRESETS.get(section)
    if names is None:
        raise ConfigError(f"[{section}] has no presets; {', '.join(PRESETS)} have")
    if preset not in names:
        raise ConfigError(f"[{section}] preset = {preset!r}; there are {', '.join(names)}")
    return _flags(section, dataclasses.asdict(names[preset]))


def _expand_presets(flags: Sequence[str]) -> Iterator[str]:
    rest = iter(flags)
    for flag in rest:
        found = re.fullmatch(r"--(\w+)\.preset(?:=(.*))?", flag)
        if found is None:
            yield flag
        else:
            yield from _preset_flags(found[1], found[2] if found[2] is not None else next(rest, ""))


def _current_names(flags: list[str]) -> list[str]:
    """Replace old names in `flags`, in place; the first process prints a note for each."""
    for index, flag in enumerate(flags):
        found = re.fullmatch(r"--(\w+)\.(no[-_])?([\w-]+)(=.*)?", flag, re.DOTALL)
        if found is None:
            continue
        section, negated, key, value = found.groups("")
        old = f"{section}.{key.replace('-', '_')}"
        if (new := RENAMED.get(old)) is not None:
            section, key = new.split(".")
            flags[index] = f"--{section}.{negated}{key}{value}"
            if os.environ.get("RANK", "0") == "0":
                print(f"note: {old} is now {new}; the old name works until version 0.3", file=sys.stderr)
    return flags


def _read_alone(kind: type[T], path: Path, text: str, flags: list[str]) -> T:
    """Parse the recipe without the command line. Raises ConfigError for a mistake in the recipe."""
    import tyro

    try:
        with _captured() as printed:
            return tyro.cli(kind, args=flags)
    except SystemExit:
        _title, *lines = (line for line in map(_bare, printed.getvalue().splitlines()) if line)
        said = " ".join(lines)
    said = re.split(r" Argument helptext:| For full helptext", said)[0]
    found = re.search(r"(?:--)?\b(\w+)\.([\w-]+)", said)
    section, key = (found[1], found[2].replace("-", "_")) if found else ("", "")
    raise ConfigError(f"{path}{_line(text, section, key)}: {said}")


@contextlib.contextmanager
def _captured() -> Iterator[io.StringIO]:
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        yield printed


def _bare(line: str) -> str:
    """A line of tyro's message without the box around it."""
    return line.strip(" │|─-╭╮╰╯+")


def _line(text: str, section: str, key: str) -> str:
    """`, line N` where the recipe sets `key` in `section` (without `key`: where the section begins); else empty."""
    now = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([\w.-]+)\s*\]", line):
            now = header[1]
            if now == section and not key:
                return f", line {number}"
        elif key and now == section and re.match(rf"\s*{re.escape(key)}\s*=", line):
            return f", line {number}"
    return ""
