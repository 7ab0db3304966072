"""Flags and tokenizer of BLIP-2's first stage."""

import argparse

import pytest

from launch.check_blip2 import check_stage_one, check_start_token, stage_one_fields
from mm_moe.backbones.blip2 import Blip2Backbone
from mm_moe.errors import ConfigError
from mm_moe.models import MultimodalMoEConfig, processors_for
from pretrain.blip2 import Blip2StageOne
from pretrain.contrastive import Contrastive
from tests.blip2_rows import FIELDS, QFORMER


def flags(**changes):
    plain = {"backbone": "blip2", "objective": "blip2_stage1", "experts_over": None}
    return argparse.Namespace(
        **{**plain, "prompt": "none", "compare_with": [], "grad_cache": False, **changes}
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backbone": "clip"}, "take --backbone blip2"),
        ({"grad_cache": True}, "does not go with --objective blip2_stage1"),
        ({"prompt": "replay"}, "'replay' is asked for"),
        ({"compare_with": ["none", "correlated"]}, "'correlated' is asked for"),
        ({"experts_over": ["image", "text"]}, "leave --experts_over out"),
    ],
)
def test_what_does_not_go_with_it_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        check_stage_one(flags(**changes), Blip2StageOne())
    check_stage_one(flags(), Blip2StageOne())
    check_stage_one(flags(**changes), Contrastive())


def test_only_this_objective_changes_the_backbone():
    assert stage_one_fields(Blip2StageOne()) == {"stage_one": True}
    assert stage_one_fields(Contrastive()) == {}


def settings_of(vocab_size: int):
    qformer = QFORMER | {"vocab_size": vocab_size}
    settings = FIELDS | {"qformer_config": qformer, "stage_one": True}
    return Blip2Backbone(settings).settings


def test_the_start_token_is_no_word_of_the_tokenizer():
    for vocab_size, words in ((4096, "must be a token of its own"), (4097, None)):
        config = MultimodalMoEConfig(
            backbone="blip2", backbone_config=settings_of(vocab_size), num_labels=0
        )
        processors = processors_for(config, source="builtin")
        if words is None:
            check_start_token(config, processors)
            continue
        with pytest.raises(ConfigError, match=words):
            check_start_token(config, processors)
