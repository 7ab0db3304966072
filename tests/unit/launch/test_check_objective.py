"""Flags of the objective: open_clip's names, options, and what is refused."""

import math

import pytest

from launch import check_objective
from launch.cli import RecipeParser
from mm_moe.errors import ConfigError
from mm_moe.training.grad_cache import GradCache
from pretrain.contrastive import Contrastive, Siglip


@pytest.fixture
def built(tmp_path):
    """(objective, configuration fields) of a command line with a recipe of its own."""

    def of(*argv: str, recipe: str = "objective: contrastive\n"):
        path = tmp_path / "mine.yaml"
        path.write_text(recipe)
        parser, words = RecipeParser(), ["--config", str(path), *argv]
        values = parser.namespace(words)
        check_objective.settle_objective(values, words)
        values.output_dir, values.use_cpu = str(tmp_path), True
        settings = parser.build(values)
        objective = check_objective.objective_of(settings, problem_type="none")
        return objective, check_objective.logit_fields(settings)

    return of


def test_the_default_is_clip(built):
    objective, fields = built()
    assert objective == Contrastive()
    assert fields == {"logit_scale_init": 2.6592, "logit_bias_init": None}


def test_open_clip_flags(built):
    objective, fields = built("--siglip", "--local_loss", "--gather_with_grad")
    assert objective == Siglip()
    assert fields == {"logit_scale_init": math.log(10), "logit_bias_init": -10.0}


def test_options_and_the_cache(built):
    config = '{"loss": "sigmoid", "variant": "ring", "chunk": 64}'
    objective, fields = built("--objective_config", config, "--grad_cache", "true")
    assert isinstance(objective, GradCache)
    assert objective.objective == Contrastive(loss="sigmoid", variant="ring", chunk=64)
    assert fields["logit_bias_init"] == -10.0


def test_other_objectives_keep_their_model(built):
    assert built(recipe="objective: supervised\n")[1] == {}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--objective_config", '{"varient": "ring"}'), "did you mean variant"),
        (("--objective_config", '{"variant": "rung"}'), "did you mean ring"),
        (("--objective_config", '{"problem_type": "none"}'), "unknown option 'problem_type'"),
        (("--objective", "supervised", "--objective_config", '{"a": 1}'), "it has none"),
        (("--objective", "supervised", "--grad_cache", "true"), "'supervised' has none"),
        (("--objective", "supervised", "--siglip"), "means --objective siglip"),
        (("--local_loss", "false"), "--local_loss false"),
        (("--gather_with_grad", "false"), "--gather_with_grad false"),
    ],
)
def test_what_cannot_be_is_refused(built, argv, words):
    with pytest.raises(ConfigError, match=words):
        built(*argv)
