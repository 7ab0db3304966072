import pytest

from mm_moe.errors import ConfigError
from mm_moe.models.building import build_model
from mm_moe.models.configuration import MultimodalMoEConfig


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ("replay", {"length": "4"}, "wrong type"),
        ("replay", {"replay_layers": 3}, "wrong type"),
        ("replay", {"gated": "false"}, "must be true or false"),
        ("replay", {"orthogonality_coef": float("nan")}, "finite"),
        ("replay", {"widths": 3}, "cannot be"),
        ("generative", {"length": 1.5}, "wrong type"),
        ("missing_aware", {"length": "4"}, "wrong type"),
    ],
)
def test_prompt_option_of_a_wrong_type_is_refused(prompt, options, says):
    config = MultimodalMoEConfig(
        backbone="small_clip",
        modalities=["image", "text"],
        prompt=prompt,
        prompt_config=options,
    )
    with pytest.raises(ConfigError, match=says):
        build_model(config)
