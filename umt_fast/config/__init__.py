"""Every setting of every job, with its default and its checks.

A run's settings are an instance of a job class: its defaults, overridden by a recipe (TOML), then by the command line.
A job is a composition of sections: `--SECTION.NAME` is the field NAME of a class in the module of its section, where
`mask`, `optim`, `compute`, `run` and `data` have modules of their own names.
"""

from umt_fast.config.base import ConfigError
from umt_fast.config.compute import (
    Attention,
    ComputeConfig,
    LowPrecisionConfig,
    Parallel,
    Precision,
    Recompute,
    StudentPrecision,
    TeacherPrecision,
    TorchAttention,
)
from umt_fast.config.data import (
    AugmentConfig,
    CaptionDataConfig,
    DataConfig,
    Decoder,
    FileDecoder,
    FrameRule,
    LabelledDataConfig,
    LoaderDecoder,
    MixConfig,
)
from umt_fast.config.finetune import InitConfig, TestConfig
from umt_fast.config.jobs import (
    FinetuneConfig,
    MaeStPretrainConfig,
    PretrainConfig,
    Stage2Config,
    VideoMaePretrainConfig,
)
from umt_fast.config.mask import MaskConfig, Masking, PixelMaskConfig, PixelMasking
from umt_fast.config.models import (
    CLASSIFIERS,
    IMAGENET_STATISTICS,
    MAE_ST_STATISTICS,
    MLP_RATIO,
    STUDENTS,
    TEACHERS,
    TEXTS,
    Activation,
    ClassifierConfig,
    MaeStConfig,
    StudentConfig,
    TeacherConfig,
    TextConfig,
    VideoMaeConfig,
    VideoTextConfig,
    VitConfig,
    check_fit,
)
from umt_fast.config.optim import FinetuneOptimConfig, OptimConfig
from umt_fast.config.run import RunConfig
from umt_fast.config.stage2 import GatherGradient, JointConfig, Stage2Job, VideoTextObjective
