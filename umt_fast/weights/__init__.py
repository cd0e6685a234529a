"""Weight files and their key names.

`files` reads and writes. `keys` maps key names to stage 1's models; `classifier`, `videomae` and `video_text` map them
to the other models.
"""

from umt_fast.weights.classifier import LoadReport, fit_positions, load_classifier, read_class_map, strip_prefixes
from umt_fast.weights.files import (
    HOW_TO_GET_CLIP,
    TensorDict,
    Weights,
    WeightsError,
    read_model,
    read_weights,
    section_of,
    using_settings_of,
    write_weights,
)
from umt_fast.weights.keys import (
    clip_image_tower,
    inflate,
    load_clip_teacher,
    load_exactly,
    load_umt_student,
    resample_positions,
    strip_wrappers,
    umt_state_dict,
)
from umt_fast.weights.video_text import (
    bert_folder,
    load_bert,
    load_stage1,
    load_video_text,
    read_bert,
    video_text_state_dict,
)
from umt_fast.weights.videomae import (
    hugging_face_videomae_names,
    load_autoencoder,
    published_videomae_names,
    save_hugging_face_videomae,
)
