"""Settings check themselves; recipes have the published numbers, and errors name mistakes in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.pretrain_objectives import SETTINGS
from umt_fast.config import (
    STUDENTS,
    TEACHERS,
    ConfigError,
    DataConfig,
    MaskConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
)
from umt_fast.masking import count_visible
from umt_fast.recipe import RENAMED, load_recipe, parse, read_key
from umt_fast.run.optim import Schedule

RECIPES = Path(__file__).parents[1] / "train" / "recipes" / "pretrain"

PUBLISHED_STUDENT = {"image_size": 224, "patch_size": 16, "tubelet_size": 1, "frames": 8, "align_layers": 6}
PUBLISHED = {
    "umt_b16_k710": (
        {"width": 768, "depth": 12, "heads": 12, "drop_path": 0.1, "target_width": 512},
        {"image_size": 224, "patch_size": 16, "width": 768, "depth": 12, "heads": 12, "target_width": 512},
    ),
    "umt_l16_k710": (
        {"width": 1024, "depth": 24, "heads": 16, "drop_path": 0.2, "target_width": 768},
        {"image_size": 196, "patch_size": 14, "width": 1024, "depth": 24, "heads": 16, "target_width": 768},
    ),
}


def recipe(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def assert_fields(owner: object, expected: dict) -> None:
    assert {key: getattr(owner, key) for key in expected} == expected


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    kind = SETTINGS[read_key(path, "objective") or "alignment"]
    assert isinstance(load_recipe(kind, path), kind)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_hold_the_published_numbers(name):
    config = load_recipe(PretrainConfig, RECIPES / f"{name}.toml")
    student, teacher = PUBLISHED[name]
    assert_fields(config.student, PUBLISHED_STUDENT | student)
    assert_fields(config.teacher, {"tubelet_size": 1, "align_layers": 6, "clip_size": 224, "grid": 14} | teacher)
    assert (config.student.grid, config.student.tokens, config.teacher.clip_patch_size) == (14, 1568, 16)
    assert (config.mask.rule, config.mask.ratio) == ("attention", 0.8)
    assert count_visible(config.student.grid**2, config.mask.ratio) == 40
    assert_fields(
        config.optim,
        {
            "epochs": 200,
            "warmup_epochs": 40,
            "batch_size": 64,
            "accumulate": 1,
            "lr": 1.5e-4,
            "min_lr": 1e-5,
            "betas": (0.9, 0.95),
            "eps": 1e-8,
            "weight_decay": 0.05,
            "clip_grad": None,
        },
    )
    assert_fields(config.data, {"crop_scales": (1.0, 0.875, 0.75, 0.66), "flip": 0.5})
    schedule = Schedule(config.optim, 658_340, 32 * 64)
    assert (schedule.peak, schedule.final) == pytest.approx((1.2e-3, 8e-5))
    assert (
        config.teacher_weights
        == {
            "umt_b16_k710": "openai/clip-vit-base-patch16",
            "umt_l16_k710": "openai/clip-vit-large-patch14",
        }[name]
    )


def test_an_empty_recipe_is_the_defaults(tmp_path):
    assert load_recipe(PretrainConfig, recipe(tmp_path, "")) == PretrainConfig()


def test_a_recipe_overrides_a_preset_and_the_rest_stays(tmp_path):
    config = load_recipe(
        PretrainConfig,
        recipe(
            tmp_path,
            '[student]\npreset = "umt_l16"\ndrop_path = 0.3\n[teacher]\npreset = "clip_l14"\n'
            "[optim]\nepochs = 3\nwarmup_epochs = 1\nbetas = [0.8, 0.9]\n",
        ),
    )
    assert config.student.drop_path == 0.3
    assert config.student.width == STUDENTS["umt_l16"].width
    assert config.teacher == TEACHERS["clip_l14"]
    assert config.optim == OptimConfig(epochs=3, warmup_epochs=1, betas=(0.8, 0.9))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("colour = 1", ["colour", "teacher_weights"]),
        ("[student]\ncolour = 1", ["line 2", "student.colour"]),
        ("[colour]\na = 1", ["colour"]),
        ('[optim]\nepochs = "many"', ["line 2", "optim.epochs", "'many'", "int"]),
        ("[optim]\nepochs = 1.5", ["line 2", "optim.epochs", "1.5", "int"]),
        ("[optim]\nepochs = true", ["line 2", "optim.epochs"]),
        ("[optim]\nlr = [1, 2]", ["2"]),
        ("[optim]\nbetas = 0.9", ["line 2", "optim.betas", "2 values"]),
        ('[student]\npreset = "umt_h16"', ["[student]", "umt_h16", "umt_b16"]),
        ('[teacher]\npreset = "clip_h14"', ["[teacher]", "clip_h14", "clip_l14_336"]),
        ('[optim]\npreset = "umt_b16"', ["[optim]", "preset"]),
        ("[student]\nimage_size = 112", ["the clip's side", "112", "224"]),
        ('[student]\npreset = "umt_l16"', ["target_width", "768", "512"]),
        ("[student]\ntubelet_size = 2", ["tubelet_size", "2", "1"]),
        ("[student]\nalign_layers = 5", ["align_layers", "5", "6"]),
        ("[student]\npatch_size = 32", ["patches along a side", "7", "14"]),
        ("[student]\npatch_size = 15", ["student", "image_size = 224", "patch_size = 15"]),
        ("[student]\nheads = 7", ["student", "width = 768", "heads = 7"]),
        ("[student]\nheads = 0", ["student", "heads = 0"]),
        ("[student]\nalign_layers = 13", ["student", "align_layers = 13", "12"]),
        ("[student]\ndrop_path = 1.0", ["student", "drop_path = 1.0"]),
        ("[teacher]\ninput_size = 225", ["teacher", "input_size = 225"]),
        ("[mask]\nratio = 1.0", ["mask.ratio = 1.0"]),
        ("[optim]\nbatch_size = 0", ["optim.batch_size = 0"]),
        ('[run]\nname = "a/b"', ["run.name = 'a/b'"]),
        ("[student\n", ["line 1"]),
        ('[mask]\nrule = "atention"', ["rule", "atention", "attention"]),
        ('[run]\nprecision = "fp16"', ["precision", "fp16", "bf16"]),
        ('[run]\ndevice = "gpu"', ["device", "gpu", "cuda"]),
        ('[optim]\nclip_grad = "much"', ["line 2", "optim.clip-grad", "much"]),
        ('[teacher]\ninput_size = "wide"', ["line 2", "teacher.input-size", "wide"]),
        ("[optim]\n\nepoch = 3", ["line 3", "optim.epoch=3", "Perhaps you meant", "optim.epochs"]),
        ("help = true", ["line 1", "help"]),
        ('tyro-write-completion = ["bash", "/nowhere"]', ["tyro-write-completion"]),
        ("[optim]\nepochs = 3 \xff", ["UTF-8"]),
        ("[optim]\nepochs = " + "9" * 5000, ["digits"]),
        ("[run]\nstop_at = 2.5", ["line 2", "run.stop-at", "2.5"]),
        ("[optim]\nbetas = [0.9]", ["line 2", "optim.betas"]),
        ('[data]\ncrop_scales = ["large"]', ["line 2", "data.crop-scales", "large"]),
    ],
)
def test_errors_name_the_file_and_the_key(tmp_path, text, words):
    path = recipe(tmp_path, text)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load_recipe(PretrainConfig, path)
    for word in (str(path), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("text", ["student = 3", 'optim = "fast"', "mask = [1]"])
def test_a_value_in_place_of_a_table_is_refused(tmp_path, text):
    path = recipe(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(PretrainConfig, path)
    assert str(path) in str(caught.value)
    assert text.split()[0] in str(caught.value)


def test_optional_settings_take_their_type(tmp_path):
    config = load_recipe(
        PretrainConfig, recipe(tmp_path, "[optim]\nclip_grad = 1\n[run]\nstop_at = 5\n[teacher]\ninput_size = 224\n")
    )
    assert (config.optim.clip_grad, config.run.stop_at, config.teacher.input_size) == (1, 5, 224)


def test_a_recipe_saved_by_windows_notepad(tmp_path):
    path = tmp_path / "bom.toml"
    path.write_bytes("\ufeff[optim]\r\nepochs = 3\r\n".encode())
    assert load_recipe(PretrainConfig, path).optim.epochs == 3


def test_flags_stand_above_the_recipe(tmp_path):
    path = recipe(
        tmp_path, '[student]\npreset = "umt_l16"\n[teacher]\npreset = "clip_l14"\n[optim]\nepochs = 3\nlr = 0.5\n'
    )
    config = parse(
        PretrainConfig, path, ["--optim.epochs", "5", "--student.drop-path=0.4", "--data.crop-scales", "1", "0.5"]
    )
    assert (config.optim.epochs, config.optim.lr, config.student.drop_path) == (5, 0.5, 0.4)
    assert (config.student.width, config.data.crop_scales) == (1024, (1.0, 0.5))


def test_a_mistake_in_the_flags_is_not_the_recipes(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(PretrainConfig, recipe(tmp_path, "[optim]\nepochs = 3\n"), ["--optim.epoch", "5"])
    assert caught.value.code == 2
    assert "Perhaps you meant" in capsys.readouterr().err


def test_help_shows_the_recipes_values(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(PretrainConfig, recipe(tmp_path, "[optim]\nepochs = 37\n"), ["--help"])
    assert caught.value.code == 0
    assert "37" in capsys.readouterr().out


@pytest.mark.parametrize("old", RENAMED)
def test_old_names_work_with_a_note(tmp_path, capsys, old):
    values = {"masks_per_clip": 2, "compile": True, "cuda_graph": True, "precision": "bf16", "attention": "math"}
    values |= {"recompute": "full", "teacher_precision": "int8", "student_precision": "fp8"}
    key = old.split(".")[1]
    value = values.get(key, 0.5)
    section, name = RENAMED[old].split(".")
    flag = f"--{old.replace('_', '-')}"
    text = f"[{old.split('.')[0]}]\n{key} = {str(value).lower() if value is True else repr(value)}\n"
    given = parse(PretrainConfig, recipe(tmp_path, ""), [flag] if value is True else [flag, str(value)])
    assert getattr(getattr(given, section), name) == value
    assert getattr(getattr(load_recipe(PretrainConfig, recipe(tmp_path, text)), section), name) == value
    assert capsys.readouterr().err.count(f"{old} is now {RENAMED[old]}") == 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StudentConfig(frames=7, tubelet_size=2), "frames = 7"),
        (lambda: StudentConfig(align_layers=0), "align_layers = 0"),
        (lambda: TeacherConfig(tubelet_size=0), "tubelet_size = 0"),
        (lambda: TeacherConfig(align_layers=13), "align_layers = 13"),
        (lambda: PretrainConfig(data=DataConfig(workers=-1)), "data.workers = -1"),
        (lambda: PretrainConfig(run=RunConfig(keep=0)), "run.keep = 0"),
        (lambda: PretrainConfig(mask=MaskConfig(ratio=-0.1)), "mask.ratio = -0.1"),
        (lambda: PretrainConfig(optim=OptimConfig(accumulate=0)), "optim.accumulate = 0"),
        (lambda: PretrainConfig(run=RunConfig(name="")), "run.name = ''"),
    ],
)
def test_configs_made_in_code_are_checked_too(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    assert words in str(caught.value)


def test_config_errors_are_value_errors():
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize(
    ("stop_at", "says"), [(None, "step 9 of 9 is reached; raise --optim.epochs"), (4, "--run.stop-at")]
)
def test_a_finished_run_says_which_setting_ends_it(stop_at, says):
    assert says in RunConfig(stop_at=stop_at).nothing_left(9, 9)
