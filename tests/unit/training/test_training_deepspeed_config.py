"""A `--deepspeed` file is refused with its place, or with both values and a way out."""

import json

import pytest

from mm_moe.errors import ConfigError
from mm_moe.training.deepspeed_config import check_deepspeed_config, read_deepspeed_config

FLAGS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 1.0,
    "bf16": False,
    "fp16": False,
}


def refusal(config: dict, **flags) -> str:
    with pytest.raises(ConfigError) as caught:
        check_deepspeed_config(config, FLAGS | flags, world_size=3)
    return str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.json' does not exist.*zero2\.json"):
        read_deepspeed_config(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match="does not exist"):
        read_deepspeed_config(tmp_path)  # a folder is no file


def test_the_line_and_column_of_a_syntax_error(tmp_path):
    file = tmp_path / "bad.json"
    file.write_text('{\n  "zero_optimization": {"stage": 2},\n  "bf16": tru\n}')
    with pytest.raises(ConfigError, match=r"bad\.json.*line 3, column 11"):
        read_deepspeed_config(file)


@pytest.mark.parametrize(
    ("content", "words"), [(b"\xff\xfe{}", "not valid JSON"), (b"[1]", "object")]
)
def test_bytes_and_values_that_are_no_object(tmp_path, content, words):
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read_deepspeed_config(file)


def test_a_good_file_is_read(tmp_path):
    file = tmp_path / "good.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    config = read_deepspeed_config(file)
    assert config["zero_optimization"] == {"stage": 1}
    assert config["gradient_clipping"] == "auto"  # DeepSpeed would clip at 1.0 of its own accord
    assert config["bf16"] == {"enabled": "auto"}
    file.write_text(json.dumps({"gradient_clipping": 0.5}))
    assert read_deepspeed_config(file)["gradient_clipping"] == 0.5


@pytest.mark.parametrize("config", [{}, {"zero_optimization": {"stage": 2}}])
def test_auto_and_absent_follow_the_flags(config):
    autos = dict.fromkeys(("train_batch_size", "gradient_clipping"), "auto")
    check_deepspeed_config({**config, **autos, "bf16": {"enabled": "auto"}}, FLAGS, world_size=3)


def test_equal_values_in_both_places_are_fine():
    config = {
        "train_batch_size": 48,  # 8 x 2 x 3 processes
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
    }
    check_deepspeed_config(config, FLAGS | {"bf16": True}, world_size=3)


@pytest.mark.parametrize("stage", [3, -1, "2", None])
def test_stages_without_expert_layers(stage):
    said = refusal({"zero_optimization": {"stage": stage}})
    assert f"stage {stage}" in said
    assert "zero2.json" in said


@pytest.mark.parametrize("key", ["optimizer", "scheduler"])
def test_what_the_trainer_owns(key):
    said = refusal({key: {"type": "Adam"}})
    assert f"'{key}'" in said
    assert "--learning_rate" in said


@pytest.mark.parametrize(
    ("config", "both"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, ("= 4", "per_device_train_batch_size = 8")),
        ({"gradient_accumulation_steps": 1}, ("= 1", "gradient_accumulation_steps = 2")),
        ({"gradient_clipping": 0.5}, ("= 0.5", "max_grad_norm = 1.0")),
        ({"train_batch_size": 16}, ("= 16", "x 3 processes = 48")),
        ({"bf16": {"enabled": True}}, ("bf16.enabled = True", "bf16 = False")),
        ({"fp16": {"enabled": True}}, ("fp16.enabled = True", "fp16 = False")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_one_thing_said_twice_and_differently(config, both):
    said = refusal(config)
    assert all(value in said for value in both)
    assert '"auto"' in said


def test_half_precision_that_is_not_exact_here():
    assert "--bf16" in refusal({}, fp16=True)
    assert "zero1.json" in refusal({"zero_optimization": {"stage": 0}}, bf16=True)
    check_deepspeed_config(
        {"zero_optimization": {"stage": 1}}, FLAGS | {"bf16": True}, world_size=3
    )


@pytest.mark.parametrize(
    ("config", "key"), [({"zero_optimization": 2}, "zero_optimization"), ({"bf16": True}, "bf16")]
)
def test_a_section_that_is_no_object(config, key):
    said = refusal(config)
    assert key in said
    assert "object" in said
