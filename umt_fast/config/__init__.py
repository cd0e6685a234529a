"""Every setting of every job, with its default and its checks. Nothing else in the project holds one.

A run is one of the job classes: a recipe (TOML) on top of their defaults, and the command line on top of the recipe.
"""

from umt_fast.config.base import (
    MLP_RATIO,
    Activation,
    Attention,
    ConfigError,
    Decoder,
    FrameRule,
    GatherGradient,
    Masking,
    Parallel,
    PixelMasking,
    Precision,
    Recompute,
    Stage2Job,
    StudentPrecision,
    TeacherPrecision,
    TorchAttention,
)
from umt_fast.config.data import AugmentConfig, CaptionDataConfig, DataConfig, LabelledDataConfig, MixConfig
from umt_fast.config.jobs import (
    FinetuneConfig,
    MaeStPretrainConfig,
    PretrainConfig,
    Stage2Config,
    VideoMaePretrainConfig,
)
from umt_fast.config.models import (
    CLASSIFIERS,
    IMAGENET_STATISTICS,
    MAE_ST_STATISTICS,
    STUDENTS,
    TEACHERS,
    TEXTS,
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
from umt_fast.config.sections import (
    ComputeConfig,
    FinetuneOptimConfig,
    InitConfig,
    JointConfig,
    LowPrecisionConfig,
    MaskConfig,
    OptimConfig,
    PixelMaskConfig,
    RunConfig,
    TestConfig,
    VideoTextObjective,
)
