"""VideoMAE to and from Hugging Face's names, against transformers; masked autoencoders from their files."""

from __future__ import annotations

import json

import pytest
import torch

from umt_fast.config import ClassifierConfig, MaeStConfig, VideoMaeConfig
from umt_fast.evaluation.features import encoder_of, load_encoder
from umt_fast.masking import hidden_ids
from umt_fast.models.classifier import VideoClassifier
from umt_fast.models.pixels import MaeSt, MaeStClassifier, VideoMae
from umt_fast.models.token_sampler import AdaMae
from umt_fast.objectives.pixels import videomae_step
from umt_fast.weights import (
    WeightsError,
    hugging_face_videomae_names,
    load_autoencoder,
    load_classifier,
    published_videomae_names,
    read_model,
    save_hugging_face_videomae,
    write_weights,
)

SIZES = {"image_size": 32, "patch_size": 8, "tubelet_size": 2, "frames": 4, "width": 32, "depth": 2, "heads": 4}
DECODER = {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2}


@pytest.fixture
def library():
    """`transformers`; its configs lack the published LayerNorm eps of 1e-6, see `same_eps`."""
    return pytest.importorskip("transformers")


def theirs(library, kind: str, **settings):
    config = library.VideoMAEConfig(
        image_size=32,
        patch_size=8,
        num_frames=4,
        tubelet_size=2,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        num_labels=5,
        **settings,
    )
    model = getattr(library, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return same_eps(model)


def same_eps(model):
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    return model


def draw_clip() -> tuple[torch.Tensor, torch.Tensor]:
    """A normalised clip [2,3,4,32,32] and the ids [2,8] of its visible tokens."""
    visible = torch.rand(2, 32).topk(8).indices.sort().values
    return torch.randn(2, 3, 4, 32, 32), visible


def hidden_mask(visible: torch.Tensor) -> torch.Tensor:
    return torch.ones(2, 32, dtype=torch.bool).scatter_(1, visible, False)


def test_pretraining_from_their_folder(library, tmp_path):
    other = theirs(library, "VideoMAEForPreTraining", use_mean_pooling=False)
    other.save_pretrained(tmp_path)
    model = VideoMae(VideoMaeConfig(**SIZES, **DECODER)).eval()
    load_autoencoder(model, read_model(tmp_path)[0])
    clip, visible = draw_clip()
    expected = other(clip.transpose(1, 2), bool_masked_pos=hidden_mask(visible))
    found = videomae_step(model, model.config, clip, visible)
    assert (found.predictions - expected.logits).abs().max() < 1e-5
    assert abs(float(found.loss.detach() - expected.loss.detach())) < 1e-5
    in_memory = VideoMae(model.config)  # the library's own names, of this version
    load_autoencoder(in_memory, other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(in_memory.parameters(), model.parameters(), strict=True))


def test_pretraining_into_their_library(library, tmp_path):
    model = VideoMae(VideoMaeConfig(**SIZES, **DECODER)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_hugging_face_videomae(model, tmp_path / "folder")
    other, loading = library.VideoMAEForPreTraining.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    clip, visible = draw_clip()
    expected = same_eps(other.eval())(clip.transpose(1, 2), bool_masked_pos=hidden_mask(visible)).logits
    assert (model(clip, visible, hidden_ids(visible, 32)) - expected).abs().max() < 1e-5


def test_fine_tuned_both_ways(library, tmp_path):
    other = theirs(library, "VideoMAEForVideoClassification", use_mean_pooling=True)
    other.save_pretrained(tmp_path / "theirs")
    config = ClassifierConfig(**SIZES, num_classes=5, positions="direct")
    model = VideoClassifier(config).eval()
    state, settings = read_model(tmp_path / "theirs")
    report = load_classifier(model, state)
    assert report.lines() == []
    assert settings["classifier"] == {key: SIZES[key] for key in SIZES if key not in ("width", "depth")} | {
        "positions": "direct"
    }
    assert settings["classes"] == [f"LABEL_{number}" for number in range(5)]
    clip, _ = draw_clip()
    expected = other(clip.transpose(1, 2)).logits
    assert (model(clip) - expected).abs().max() < 1e-5
    assert (load_encoder(tmp_path / "theirs").pooled(clip) - model.features(clip)).abs().max() < 1e-5
    save_hugging_face_videomae(model, tmp_path / "ours")
    again, loading = library.VideoMAEForVideoClassification.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert (same_eps(again.eval())(clip.transpose(1, 2)).logits - expected).abs().max() < 1e-5


def test_pretrained_into_a_classifier(library, tmp_path):
    """Only the decoder and the last norm are left out, by design."""
    other = theirs(library, "VideoMAEForPreTraining", use_mean_pooling=False)
    other.save_pretrained(tmp_path)
    model = VideoClassifier(ClassifierConfig(**SIZES, num_classes=5, positions="direct"))
    report = load_classifier(model, read_model(tmp_path)[0])
    assert report.unforeseen() == []
    assert report.missing == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    assert torch.equal(model.blocks[1].attn.q_bias, other.videomae.encoder.layer[1].attention.attention.query.bias)


def test_the_sampler_of_adamae_is_left_out():
    model = VideoClassifier(ClassifierConfig(**SIZES, num_classes=5, positions="direct"))
    report = load_classifier(model, AdaMae(VideoMaeConfig(**SIZES, **DECODER)).state_dict())
    assert report.unforeseen() == []
    assert "pos_embed_probs" in report.unexpected
    assert "mask_token" in report.unexpected


def test_parts_of_an_attention_that_do_not_fit_each_other():
    state = hugging_face_videomae_names(VideoMae(VideoMaeConfig(**SIZES, **DECODER)).state_dict())
    for part in ("query", "key", "value"):
        key = f"videomae.encoder.layer.0.attention.attention.{part}.weight"
        for shape in ((), (7,), (3, 5), (1, 2, 3), (0,)):
            with pytest.raises(WeightsError, match=r"attention\.attention"):
                load_autoencoder(VideoMae(VideoMaeConfig(**SIZES, **DECODER)), {**state, key: torch.zeros(shape)})


def test_names_there_and_back():
    state = VideoMae(VideoMaeConfig(**SIZES, **DECODER)).state_dict()
    renamed = hugging_face_videomae_names(state)
    assert not renamed.keys() & (state.keys() - {"mask_token", "encoder_to_decoder.weight", *_SAME})
    back = published_videomae_names(renamed)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    del renamed["videomae.encoder.layer.1.attention.attention.key.weight"]
    with pytest.raises(WeightsError, match=r"missing videomae\.encoder\.layer\.1\.attention\.attention\.key\.weight"):
        published_videomae_names(renamed)


_SAME = ("decoder.norm.weight", "decoder.norm.bias", "decoder.head.weight", "decoder.head.bias")


def test_models_that_their_library_does_not_have(tmp_path):
    with pytest.raises(WeightsError, match="no AdaMAE"):
        save_hugging_face_videomae(AdaMae(VideoMaeConfig(**SIZES, **DECODER)), tmp_path)
    with pytest.raises(WeightsError, match="this classifier does not"):
        save_hugging_face_videomae(VideoClassifier(ClassifierConfig(**SIZES)), tmp_path)


@pytest.mark.parametrize("top", ["model", "module", "model_state", None])
@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod."])
def test_autoencoders_from_their_own_files(tmp_path, top, wrapper):
    config = MaeStConfig(**SIZES, decoder_width=16, decoder_depth=1, decoder_heads=2, target_frames=2)
    model, other = MaeSt(config), MaeSt(config)
    state = {wrapper + key: value for key, value in other.state_dict().items()}
    torch.save({top: state, "epoch": 3} if top else state, tmp_path / "a.pth")
    load_autoencoder(model, read_model(tmp_path / "a.pth")[0])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(WeightsError, match=r"do not fit the VideoMae: missing encoder.*unexpected cls_token"):
        load_autoencoder(VideoMae(VideoMaeConfig(**SIZES, **DECODER)), other.state_dict())


def test_heads_of_fine_tuned_mae_st(tmp_path):
    """PySlowFast names the head `head.projection`; its files have the model under `model_state`."""
    config = MaeStConfig(**SIZES, decoder_width=16, decoder_heads=2, target_frames=2)
    model, other = MaeStClassifier(config, 5), MaeStClassifier(config, 5)
    state = {key.replace("head.", "head.projection."): value for key, value in other.state_dict().items()}
    torch.save({"model_state": state, "epoch": 3}, tmp_path / "a.pyth")
    report = load_classifier(model, read_model(tmp_path / "a.pyth")[0])
    assert report.lines() == []
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("settings", [{"image_size": [32, 48]}, {"num_frames": "16"}, {"tubelet_size": 0}])
def test_an_impossible_config_is_refused(tmp_path, settings):
    model = VideoClassifier(ClassifierConfig(**SIZES, positions="direct"))
    save_hugging_face_videomae(model, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | settings))
    with pytest.raises(WeightsError, match="give an integer >= 1"):
        read_model(tmp_path)


def test_encoders_of_autoencoders(tmp_path):
    """Sizes come from our checkpoint's settings; an MAE-ST encoder is refused with an error that names it."""
    model = VideoMae(VideoMaeConfig(**SIZES, **DECODER, mlp_width=96)).eval()
    clip, _ = draw_clip()
    state, settings = model.state_dict(), {"model": {"frames": 4, "image_size": 32, "heads": 4}}
    encoder = encoder_of(state, settings, "x.pth").eval()
    every = torch.arange(32).expand(2, -1)
    assert (encoder(clip) - model.encode(clip, every)).abs().max() < 1e-5
    write_weights(
        tmp_path / "a.pth", MaeSt(MaeStConfig(**SIZES, decoder_width=16, decoder_heads=2, target_frames=2)).state_dict()
    )
    with pytest.raises(WeightsError, match="is a MAE-ST"):
        load_encoder(tmp_path / "a.pth", heads=4, frames=4, image_size=32)
