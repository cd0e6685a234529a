"""What README and docs name is there: links, headings, files, recipes, settings."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from train import evaluate, evaluate_video_text, finetune, pretrain, stage2
from umt_fast.config import FinetuneConfig, Stage2Config

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/*.md")), *sorted(REPOSITORY.glob("kernels/**/*.md"))]
CONFIGS = (
    *pretrain.SETTINGS.values(),
    FinetuneConfig,
    Stage2Config,
    evaluate.EvaluateConfig,
    evaluate_video_text.VideoTextTestConfig,
)
RECIPES = {path.stem for page in (pretrain, finetune, stage2) for path in page.RECIPES.glob("*.toml")}
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not heading or heading in anchors(file), f"{target}#{heading}"


@pages
def test_settings_and_recipes_exist(page: Path) -> None:
    known = set()
    for config in CONFIGS:
        default = config()
        for section in dataclasses.fields(config):
            if dataclasses.is_dataclass(value := getattr(default, section.name)):
                known |= {f"{section.name}.{field.name}" for field in dataclasses.fields(value)} | {
                    f"{section.name}.preset"
                }
    text = page.read_text()
    for flag in re.findall(r"--([a-z]\w*\.[a-z][\w-]*)", text):
        assert flag.replace("-", "_").replace(".no_", ".") in known, flag
    for recipe in re.findall(r"--recipe (\w+)", text):
        assert recipe in RECIPES, recipe


@pages
def test_modules_exist(page: Path) -> None:
    for name in re.findall(r"python -m ((?:umt_fast|train|benchmarks|tests)(?:\.\w+)*)", page.read_text()):
        path = REPOSITORY / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name
