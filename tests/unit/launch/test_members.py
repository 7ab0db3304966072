"""Members of a run: from flags to configurations, from earlier runs, and what is refused."""

import json

import pytest
import torch

from launch.cli import RecipeParser
from launch.members import check_members, composed_config, composed_model
from mm_moe.data.sets.emoji import EmojiData
from mm_moe.errors import CheckpointError, ConfigError
from mm_moe.models import ComposedModel, MultimodalMoEConfig, MultimodalMoEModel
from mm_moe.moe.layer import moe_layers

torch.set_num_threads(1)
SMALL = {"patch_size": 16, "num_blocks": 2, "width": 16, "num_heads": 2, "hidden": 24}
FAMILY = ["--experts_over", "image", "text", "text+image"]
RECIPE = {"prompt": "none", "backbone_config": SMALL, "pretrained": "none"}


def parsed(tmp_path, *words):
    parser = RecipeParser()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("# A recipe.\n" + json.dumps(RECIPE))
    values = parser.namespace(["--config", str(recipe), *words])
    values.pretrained = None
    return parser, values


def model_of(tmp_path, *words) -> ComposedModel:
    parser, values = parsed(tmp_path, *words)
    check_members(values, EmojiData())
    values.output_dir = str(tmp_path / "run")
    values.use_cpu = True
    values.deepspeed = None
    settings = parser.build(values)
    config = composed_config(settings, EmojiData(), prompt="none")
    return composed_model(settings, config)


def test_flags_make_the_family(tmp_path):
    options = {"image+text": {"fusion": "low_rank", "fusion_rank": 3, "moe": None}}
    model = model_of(tmp_path, *FAMILY, "--members_config", json.dumps(options))
    assert model.names == ("image", "text", "image+text")  # in the data's order
    assert [list(model.member(name).modalities) for name in model.names] == [
        ["image"],
        ["text"],
        ["image", "text"],
    ]
    assert model.member("image+text").head.low_rank.factors[0].shape[0] == 3
    assert [len(moe_layers(model.member(name))) for name in model.names] == [1, 1, 0]
    assert model.config.label_names == list(EmojiData().label_names)


def test_a_mixture_has_a_gate_over_everything(tmp_path):
    gate = json.dumps({"gate": {"moe": None}})
    words = ["--combine", "mixture", "--members_config", gate]
    model = model_of(tmp_path, "--experts_over", "image", "text", *words)
    assert list(model.members) == ["image", "text", "gate"]
    assert model.member("gate").config.num_labels == 2
    assert model.names == ("image", "text")


def test_members_start_from_runs_and_become_sparse(tmp_path):
    dense = model_of(tmp_path, "--experts_over", "image", "--moe_enable", "false")
    dense.save_pretrained(tmp_path / "a" / "final")
    ordinary = MultimodalMoEModel(
        MultimodalMoEConfig(
            backbone_config=dense.member("image").config.backbone_config,
            label_names=EmojiData().label_names,
            modalities=["image", "text"],
        )
    )
    ordinary.save_pretrained(tmp_path / "b")
    runs = [f"image={tmp_path / 'a'}", f"image+text={tmp_path / 'b'}"]
    model = model_of(tmp_path, *FAMILY, "--init_members", *runs)
    assert len(moe_layers(model.member("image"))) == 1  # experts are copies of the dense layer
    assert torch.equal(model.member("image").head.weight, dense.member("image").head.weight)
    assert torch.equal(model.member("image+text").head.weight, ordinary.head.weight)
    batch = {"present": torch.tensor([[True, False]])}
    batch["inputs"] = {"image": {"pixel_values": torch.randn(1, 3, 64, 64)}}
    expected = dense.eval()(**batch).logits
    assert torch.allclose(model.eval()(**batch).logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--combine", "mean"], "--combine is for models of several members"),
        (["--init_members", "image=x"], "--experts_over image text image"),
        (["--experts_over", "image", "smell"], "member 'smell' must join modalities"),
        (["--experts_over", "image", "image"], "twice"),
        ([*FAMILY, "--keep_head", "true"], "--init_members"),
        ([*FAMILY, "--combine", "sum"], "unknown combine 'sum'"),
        ([*FAMILY, "--freeze_members", "audio"], "cannot freeze 'audio'"),
        ([*FAMILY, "--init_members", "image"], "must be MEMBER=RUN"),
        ([*FAMILY, "--members_config", '{"audio": {}}'], "'audio'"),
        ([*FAMILY, "--members_config", '{"text": {"fusio": 1}}'], "did you mean fusion"),
        ([*FAMILY, "--fusion", "tensor"], "unknown fusion 'tensor'"),
    ],
)
def test_flags_that_cannot_work_are_refused(tmp_path, words, match):
    _, values = parsed(tmp_path, *words)
    with pytest.raises(ConfigError, match=match):
        check_members(values, EmojiData())


def test_a_run_that_does_not_fit_is_refused(tmp_path):
    model_of(tmp_path, "--experts_over", "image").save_pretrained(tmp_path / "a")
    for name, match in (("text", "has the members image"), ("image", None)):
        _, values = parsed(tmp_path, *FAMILY, "--init_members", f"{name}={tmp_path / 'a'}")
        if match:
            with pytest.raises(CheckpointError, match=match):
                check_members(values, EmojiData())
        else:
            check_members(values, EmojiData())
    _, values = parsed(tmp_path, *FAMILY, "--init_members", f"image={tmp_path / 'nowhere'}")
    with pytest.raises(CheckpointError, match="there is no folder"):
        check_members(values, EmojiData())
    (tmp_path / "empty").mkdir()
    _, values = parsed(tmp_path, *FAMILY, "--init_members", f"image={tmp_path / 'empty'}")
    with pytest.raises(CheckpointError, match="holds no model of this library"):
        check_members(values, EmojiData())
