"""The planner refuses what training refuses, in the same words, and starts nothing."""

import json
import os

import pytest
import torch.distributed as dist

from launch import plan, train
from mm_moe.errors import ConfigError, MMMoEError, ParallelismError

SHAPE = {"patch_size": 32, "num_blocks": 2, "width": 16, "num_heads": 2, "hidden": 32}
TINY = (
    *("--backbone_config", json.dumps(SHAPE), "--pretrained", "none", "--prompt", "none"),
    *("--prompt_config", "{}", "--num_experts", "4", "--global_batch_size", "0"),
    *("--per_device_train_batch_size", "1024"),
)


def refused(program, *argv: str) -> tuple[type, str]:
    with pytest.raises(MMMoEError) as caught:
        program.main(list(argv))
    return caught.type, str(caught.value)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["--router", "topk_sofmax"], ConfigError),
        (["--top_k_experts", "5"], ConfigError),
        (["--num_experts", "3", "--ep_size", "2"], ParallelismError),
        (["--ep_size", "3"], ParallelismError),
        (["--global_batch_size", "15"], ConfigError),
        (["--missing_type", "sound"], ConfigError),
        (["--moe_layers_idx", "9"], ConfigError),
        (["--max_stepz", "9"], ConfigError),
        (["--activation_checkpointing_kwargs", '{"offload": true}'], ConfigError),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_what_training_refuses(words, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    got = refused(plan, "--world_size", "2", *words)
    assert got[0] is kind
    if "--moe_layers_idx" not in words:  # training finds that one after its start
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert refused(train, *words) == got


def test_zero_3_is_refused_alike(tmp_path):
    file = tmp_path / "zero3.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    kind, said = refused(plan, "--deepspeed", str(file))
    assert kind is ConfigError
    assert "stage 3" in said
    assert refused(train, "--deepspeed", str(file)) == (kind, said)


@pytest.mark.parametrize(
    ("words", "said_words"),
    [
        (["--gpu", "H10"], ("'H10'", "H100")),
        (["--world_size", "0"], ("--world_size (0)", "at least 1")),
        (["--world_size", "12"], ("(12)", "(8)", "try 8")),
        (["--imbalance", "0.5"], ("(0.5)", "at least 1")),
        (["--reserve_share", "1"], ("[0, 1)",)),
        (["--gpu_memory_gib", "-1"], ("above 0",)),
        (["--text_tokens", "25"], ("(25)", "24 positions")),
        (["--world_size", "two"], ("world_size", "'two'")),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_machine_that_cannot_be(words, said_words):
    kind, said = refused(plan, *words)
    assert kind is ConfigError
    assert all(word in said for word in said_words)


@pytest.fixture(scope="module")
def spread(tmp_path_factory) -> dict:
    """A tiny model planned for two nodes of two, the experts over both."""
    folder = tmp_path_factory.mktemp("plan")
    before, running = dict(os.environ), dist.is_initialized()
    words = ["--world_size", "4", "--gpus_per_node", "2", "--ep_size", "4", "--bf16", "true"]
    file = folder / "plan.json"
    assert plan.main([*TINY, *words, "--missing_type", "none", "--json", str(file)]) == 0
    assert dist.is_initialized() == running
    assert dict(os.environ) == before
    assert [path.name for path in folder.iterdir()] == ["plan.json"]
    return json.loads(file.read_text())


def test_parameters_are_those_of_the_model(spread):
    # per sparse layer 4 experts of 16 * 32 + 32 + 32 * 16 + 16
    for tower in ("image", "text"):
        part = spread["parameters"][tower]
        assert part["expert"] == 4 * (2 * 16 * 32 + 32 + 16)
        assert part["active"] == part["dense"] + part["expert"] // 4
        assert part["trainable"] == part["dense"] + part["expert"]
    assert spread["parameters"]["head"]["dense"] == 9 * 2 * 128 + 9


def test_stages_by_hand(spread):
    assert set(spread["memory"]) == {"ZeRO-1", "ZeRO-2", "ZeRO-2 + offload"}  # no bf16 at stage 0
    dense = sum(part["dense"] for part in spread["parameters"].values())
    local = sum(part["expert"] for part in spread["parameters"].values()) // 4
    row = spread["memory"]["ZeRO-1"]
    assert row["weights"] == pytest.approx(2 * (dense + local), rel=1e-3)
    # the dense state is spread over 4, that of an expert is whole: one process has it
    assert row["optimizer"] == pytest.approx(12 * (dense / 4 + local), rel=1e-3)
    assert row["device"] == sum(
        row[part] for part in ("weights", "optimizer", "gradients", "activations", "buffers")
    )


def test_rows_of_experts_leave_the_node(spread):
    # 1024 images of 1 + 4 tokens, texts of 24; 16 wide, bf16, out and back, forward and backward
    rows = 1024 * (5 + 24)
    sent = rows * 16 * 2 * 4
    part = spread["traffic"]["expert all-to-all"]
    assert part == {"near": pytest.approx(sent / 4), "far": pytest.approx(sent / 2)}
    assert any("--ep_size 2" in line and "nodes of 2" in line for line in spread["advice"])
    assert any("reduce_bucket_size" in line for line in spread["advice"])


def test_checkpointing_saves_activations(spread):
    kept = spread["memory"][spread["own_stage"]]["activations"]
    assert spread["with_activation_checkpointing"]["activations"] < kept
