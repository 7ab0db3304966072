"""Every shipped DeepSpeed file parses, holds only known keys and leaves no "auto" open."""

import json
from pathlib import Path

import pytest
import torch
from deepspeed.runtime import constants, precision_config
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero import config as zero_config
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

FOLDER = Path(__file__).parents[2] / "ds_configs"
FILES = sorted(path.name for path in FOLDER.glob("*.json"))
KNOWN = {
    value
    for module in (constants, precision_config, zero_config)
    for name, value in vars(module).items()
    if name.isupper() and isinstance(value, str)
}


def load(name: str) -> dict:
    return json.loads((FOLDER / name).read_text())


def filled(name: str, tmp_path: Path, **flags) -> dict:
    """The settings as `transformers` hands them to DeepSpeed for a run of one process."""
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **flags)
    settings = HfTrainerDeepSpeedConfig(load(name))
    settings.trainer_config_process(arguments)
    settings.trainer_config_finalize(arguments, torch.nn.Linear(1, 1), num_training_steps=10)
    return settings.config


def autos(node, path="") -> list[str]:
    if isinstance(node, dict):
        return [leaf for key, value in node.items() for leaf in autos(value, f"{path}/{key}")]
    return [path] if node == "auto" else []


def test_the_four_files_are_there():
    assert {"zero0.json", "zero1.json", "zero2.json", "zero2_offload.json"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_known_to_deepspeed(name):
    settings = load(name)
    assert set(settings) <= KNOWN
    # DeepSpeed's own table of ZeRO settings refuses an unknown key.
    zero_config.DeepSpeedZeroConfig(**settings["zero_optimization"])


@pytest.mark.parametrize("name", FILES)
def test_transformers_fills_every_auto(name, tmp_path):
    assert set(autos(load(name))) == {
        *("/train_batch_size", "/train_micro_batch_size_per_gpu", "/gradient_accumulation_steps"),
        *("/gradient_clipping", "/bf16/enabled", "/fp16/enabled"),
    }
    flags = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
    settings = filled(name, tmp_path, max_grad_norm=0.5, **flags)
    assert autos(settings) == []
    assert settings["train_batch_size"] == 12  # 1 process x 6 samples x 2 accumulated
    assert settings["gradient_clipping"] == 0.5


@pytest.mark.parametrize("name", FILES)
def test_deepspeed_accepts_what_transformers_filled(name, tmp_path):
    config = DeepSpeedConfig(filled(name, tmp_path))
    offload = config.zero_config.offload_optimizer
    assert config.zero_optimization_stage == int(name[len("zero")])
    assert ("offload" in name) == (offload is not None and offload.device == "cpu")
    # The client's torch AdamW is used as it is, also when its state is offloaded.
    assert config.zero_allow_untested_optimizer
    assert not config.zero_force_ds_cpu_optimizer
    assert config.optimizer_name is None


@pytest.mark.parametrize("name", FILES)
def test_the_readme_says_when_to_take_it(name):
    rows = [line for line in (FOLDER / "README.md").read_text().splitlines() if f"`{name}`" in line]
    assert len(rows) == 1
