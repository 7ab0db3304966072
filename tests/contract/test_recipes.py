"""Every shipped recipe: its keys are flags, its values fit, its names are registered."""

from pathlib import Path

import pytest

from launch.cli import DEFAULT_RECIPE, RecipeParser
from mm_moe.registry import BACKBONES, DATASETS, PROMPTS

ROOT = Path(__file__).parents[2]
RECIPES = sorted(
    path.relative_to(ROOT).as_posix()
    for room in ("pretrain", "finetune")
    for path in (ROOT / room / "recipes").glob("*.yaml")
)


def test_the_default_recipe_is_shipped():
    assert DEFAULT_RECIPE in RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_can_be_run(recipe, tmp_path):
    parser = RecipeParser()
    values = parser.namespace(["--config", recipe, "--output_dir", str(tmp_path), "--use_cpu"])
    settings = parser.build(values)
    assert BACKBONES.resolve(settings.model.backbone)
    assert PROMPTS.resolve(settings.prompt.prompt)
    assert DATASETS.resolve(settings.data.dataset)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_says_what_it_does(recipe):
    assert (ROOT / recipe).read_text().startswith("# ")
