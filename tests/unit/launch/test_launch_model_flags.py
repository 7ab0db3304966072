"""The flags of the model that stand for others: open_clip's --model, and LoRA's numbers."""

import json

import open_clip
import pytest

from launch.cli import RecipeParser
from launch.model_config import model_config
from launch.model_flags import settle_model
from mm_moe.backbones.openclip import OpenClipBackbone
from mm_moe.data.sets.emoji import EmojiData
from mm_moe.errors import CheckpointError, ConfigError


def settled(*argv):
    values = RecipeParser().namespace(list(argv))
    settle_model(values, list(argv))
    return values


def test_model_stands_for_backbone_and_configuration():
    values = settled("--model", "ViT-B-16", "--pretrained", "laion2b_s34b_b88k")
    assert values.backbone == "open_clip"
    assert json.loads(values.backbone_config) == {"model": "ViT-B-16"}
    assert values.pretrained == "laion2b_s34b_b88k"
    assert settled("--model", "ViT-B-16").pretrained is None  # not the recipe's "builtin"
    more = settled("--model", "ViT-B-16", "--backbone_config", '{"image_std": [1, 1, 1]}')
    assert json.loads(more.backbone_config) == {"image_std": [1, 1, 1], "model": "ViT-B-16"}


def test_without_it_nothing_changes():
    values = settled()
    assert (values.backbone, values.pretrained) == ("small_clip", "builtin")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--model", "ViT-B-17"), "unknown open_clip model 'ViT-B-17'; did you mean"),
        (("--model", "ViT-B-16", "--backbone", "clip"), "--backbone says 'clip'; drop one"),
        (
            ("--model", "ViT-B-16", "--backbone_config", '{"model": "RN50"}'),
            "'ViT-B-16' and backbone_config.model 'RN50' contradict",
        ),
        (("--lora_r", "-1"), "--lora_r -1 must be at least 0"),
        (("--lora_r", "2", "--lora_dropout", "1"), r"lora.dropout \(1.0\)"),
        (("--lora_r", "2", "--lora_alpha", "0"), r"lora.alpha \(0.0\)"),
    ],
)
def test_contradictions_are_refused(argv, message):
    with pytest.raises(ConfigError, match=message):
        settled(*argv)


def test_weights_that_cannot_be_fetched_name_a_way_out(monkeypatch):
    def offline(*args, **kwargs):
        raise RuntimeError("Failed to download weights")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(CheckpointError, match=r"not on this machine .*--pretrained FILE"):
        OpenClipBackbone.load(
            "laion2b_s34b_b88k", settings={"model": "ViT-B-16"}, modalities=("text",)
        )


@pytest.mark.parametrize("words", [(), ("--feature_norm", "false", "--pad_text", "0")])
def test_feature_norm_and_padding_reach_the_configuration(words, tmp_path):
    parser = RecipeParser()
    argv = [*words, "--pretrained", "none", "--output_dir", str(tmp_path), "--use_cpu"]
    config = model_config(parser.build(parser.namespace(argv)), EmojiData(), prompt="none")
    assert config.feature_norm is not bool(words)
    assert config.pad_text == (0 if words else None)
