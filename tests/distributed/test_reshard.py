"""A checkpoint knows no layout: saved at one, resumed at any other, with its optimizer state.

A model with eight experts is trained on four processes (ep_size 4, ZeRO-2) and saved as the program
does. Fresh engines with other weights restore it on 1, 2, 4 and 8 processes at every ep_size and
at ZeRO 0, 1 and 2: logits, masters and Adam moments are equal bit for bit, the moments sit with the
rank that holds the expert, and the next steps follow the run that was not interrupted. Then from
ZeRO-0 back to ZeRO-2, and from eight processes to four. What takes eight processes is `slow`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed

SAMPLES, EXPERTS, STEPS, MORE = 8, 8, 3, 3  # SAMPLES over all ranks
SMALL = {"width": 8, "num_blocks": 2, "num_heads": 2, "hidden": 12, "projection": 8}
SMALL |= {"vocab_size": 50, "patch_size": 32}
STEP = f"checkpoint-{STEPS}"
CLIP = 0.5
EPS = 1e-5  # far above the noise of a gradient; 1e-8 makes whole steps of it
MOMENTS = ("exp_avg", "exp_avg_sq", "master")


def build(seed: int):
    """A model with sparse layers in every block; top_k 1, so that some experts get nothing."""
    from mm_moe.models import MultimodalMoEConfig, build_model

    torch.manual_seed(seed)
    config = MultimodalMoEConfig(
        backbone_config=dict(SMALL),
        label_names=["x", "y", "z"],
        moe={"num_experts": EXPERTS, "top_k": 1},
        moe_layers=[0, 1],
        prompt="replay",
    )
    return build_model(config)


def batch_of(step: int, rows: slice) -> dict:
    """Some samples of a global batch: of every four, two have both modalities, two have one."""
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randn(SAMPLES, 3, 64, 64, generator=generator)[rows]
    ids = torch.randint(3, 50, (SAMPLES, 6), generator=generator)[rows]
    ids[:, 0], ids[:, 4], ids[:, 5] = 0, 1, 2
    present = torch.tensor([[True, True], [True, False], [False, True], [True, True]] * 2)[rows]
    inputs = {}
    if present[:, 0].any():
        inputs["image"] = {"pixel_values": pixels[present[:, 0]]}
    if present[:, 1].any():
        text = ids[present[:, 1]]
        inputs["text"] = {"input_ids": text, "attention_mask": (text != 2).long()}
    return {"present": present, "inputs": inputs, "labels": torch.arange(SAMPLES)[rows] % 3}


class Run:
    """An engine and its schedule, made as the trainer makes its own."""

    def __init__(self, rank: int, world_size: int, *, ep_size: int, stage: int, seed: int) -> None:
        import deepspeed

        from mm_moe.moe.parallel import make_expert_parallel
        from mm_moe.training.clip import clip_without_zero
        from mm_moe.training.optimizer import parameter_groups

        share = SAMPLES // world_size
        self.rank, self.world_size, self.ep_size = rank, world_size, ep_size
        self.rows = slice(rank * share, (rank + 1) * share)
        model = make_expert_parallel(self.model(seed), ep_size=ep_size)
        groups = parameter_groups(model, weight_decay=0.05, learning_rate=3e-3)
        optimizer = torch.optim.AdamW(groups, eps=EPS)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        config = {
            "train_micro_batch_size_per_gpu": share,
            "zero_optimization": {"stage": stage},
            "gradient_clipping": CLIP,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        clip_without_zero(self.engine)

    def model(self, seed: int):
        return build(seed)

    def train(self, steps: range) -> list[float]:
        """Mean losses over the ranks."""
        from mm_moe.training import runtime

        losses = []
        for step in steps:
            batch = batch_of(step, self.rows)
            output = self.engine(**batch)
            loss = F.cross_entropy(output.logits, batch["labels"]) + sum(output.losses.values())
            self.engine.backward(loss)
            self.engine.step()
            self.scheduler.step()
            losses.append(sum(runtime.gather_objects(loss.item())) / self.world_size)
        return losses

    def logits(self) -> torch.Tensor:
        """Of the first batch on rank 0; the others have no row, so that products are the same."""
        rows = slice(0, SAMPLES) if self.rank == 0 else slice(0, 0)
        self.engine.eval()
        with torch.no_grad():
            logits = self.engine(**batch_of(0, rows)).logits
        self.engine.train()
        return logits

    def save(self, folder: str) -> None:
        from transformers import TrainerState

        from mm_moe.training import state
        from mm_moe.training.saving import Saver

        def take(apart: bool):
            return state.take(
                engine=self.engine,
                scheduler=self.scheduler,
                trainer_state=TrainerState(global_step=STEPS),
                samples=STEPS * SAMPLES,
                save_extra=lambda folder: None,
                apart=apart,
            )

        Saver(Path(folder)).save(STEPS, take)

    def restore(self, folder: str) -> None:
        from mm_moe.training import state

        state.restore(Path(folder, STEP), engine=self.engine, scheduler=self.scheduler)

    def differing(self, folder: str) -> list[str]:
        """Tensors that are not those of a checkpoint, gathered and as this rank holds them."""
        from mm_moe.checkpoint.logical import full_weights, optimizer_tensors

        weights = load_file(Path(folder, STEP, "model.safetensors"))
        moments = load_file(Path(folder, STEP, "optimizer.safetensors"))
        ours, step = optimizer_tensors(self.engine)
        ours |= full_weights(self.engine.module)
        assert ours.keys() == (weights | moments).keys()
        wrong = [k for k, value in (weights | moments).items() if not torch.equal(ours[k], value)]
        held = EXPERTS // self.ep_size
        mine = slice(self.rank % self.ep_size * held, (self.rank % self.ep_size + 1) * held)
        for name, parameter in self.engine.module.named_parameters():
            for key in MOMENTS:
                if not parameter.requires_grad:
                    continue
                whole = moments[f"{key}/{name}"]
                own = self.own(parameter, key)
                if not torch.equal(own, whole[mine] if ".experts." in name else whole):
                    wrong.append(f"{key}/{name} on rank {self.rank}")
        return wrong + ([] if step == STEPS else [f"optimizer step {step}"])

    def own(self, parameter, key: str) -> torch.Tensor:
        """What this rank's optimizer holds for its own parameter."""
        if hasattr(parameter, "get_full_hp_param"):
            return parameter.get_full_hp_param(None if key == "master" else key)
        return parameter if key == "master" else self.engine.optimizer.state[parameter][key]


def train_and_save(rank, world_size, folder, ep_size):
    """What the run that is not interrupted sees."""
    run = Run(rank, world_size, ep_size=ep_size, stage=2, seed=1)
    run.train(range(STEPS))
    run.save(folder)
    return {"wrong": run.differing(folder), "logits": run.logits()} | {
        "losses": run.train(range(STEPS, STEPS + MORE))
    }


def resume(rank, world_size, cells):
    """Restore folders at layouts: cells are (folder, ep_size, stage, folder to save into or "")."""
    found = []
    for folder, ep_size, stage, again in cells:
        run = Run(rank, world_size, ep_size=ep_size, stage=stage, seed=2)
        before = run.logits()
        run.restore(folder)
        if again:
            run.save(again)
        result = {"wrong": run.differing(folder), "before": before, "logits": run.logits()}
        rates = [group["lr"] for group in run.engine.optimizer.param_groups]
        losses = run.train(range(STEPS, STEPS + MORE))
        found.append(result | {"rates": rates, "losses": losses})
    return found


def results_of(references, plans) -> dict:
    """(what the uninterrupted ranks saw, what the resumed ones see) by layout and folder.

    Args:
        references: folder -> what `train_and_save` returned.
        plans: processes -> cells of `resume`, in the order in which they run.
    """
    results = {}
    for world_size, cells in plans.items():
        ranks = run_distributed(resume, world_size, cells, timeout_s=300)
        for i, (folder, ep_size, stage, _) in enumerate(cells):
            key = (world_size, ep_size, stage, Path(folder).name)
            results[key] = references[folder], [rank[i] for rank in ranks]
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of the run on four processes, and what its ranks saw."""
    folder = str(tmp_path_factory.mktemp("four"))
    return folder, run_distributed(train_and_save, 4, folder, 4)


@pytest.fixture(scope="module")
def results(saved, tmp_path_factory):
    """Fewer processes, another ep_size, and from ZeRO-2 to 0 and back."""
    (four, seen), again = saved, str(tmp_path_factory.mktemp("again"))
    plans = {
        1: [(four, 1, 2, "")],
        2: [(four, 1, 1, ""), (four, 2, 0, again)],
        4: [(four, 1, 0, ""), (again, 4, 2, "")],
    }
    return results_of({four: seen, again: seen}, plans)


@pytest.fixture(scope="module")
def more_results(saved, tmp_path_factory):
    """Every ep_size on four and on eight processes, and from eight to four."""
    (four, seen), eight = saved, str(tmp_path_factory.mktemp("eight"))
    references = {four: seen, eight: run_distributed(train_and_save, 8, eight, 8, timeout_s=300)}
    plans = {
        1: [(four, 1, 0, ""), (four, 1, 1, "")],
        8: [(four, ep_size, 2, "") for ep_size in (1, 2, 4, 8)],
        4: [(four, 2, 1, ""), (four, 4, 2, ""), (eight, 4, 2, "")],
    }
    assert [rank["wrong"] for rank in references[eight]] == [[]] * 8
    return results_of(references, plans)


def test_what_is_saved_is_what_the_ranks_hold(saved):
    assert [rank["wrong"] for rank in saved[1]] == [[]] * 4


def test_some_experts_had_no_token_and_others_moved(saved):
    moments = load_file(Path(saved[0], STEP, "optimizer.safetensors"))
    seen = torch.stack(
        [
            value.flatten(1).any(1)
            for name, value in moments.items()
            if name.startswith("exp_avg_sq/") and name.endswith("experts.w_in")
        ]
    )
    assert seen.any(1).all()
    assert not seen.all()


def check_tensors(results) -> None:
    for cell, (_, ranks) in results.items():
        assert [rank["wrong"] for rank in ranks] == [[]] * len(ranks), cell


def check_logits(results) -> None:
    for cell, (reference, ranks) in results.items():
        expected = reference[0]["logits"]
        assert not torch.equal(ranks[0]["before"], expected)
        assert torch.equal(ranks[0]["logits"], expected), cell


def check_next_steps(results) -> None:
    for cell, (reference, ranks) in results.items():
        for rank in ranks:
            assert rank["losses"] == pytest.approx(reference[0]["losses"], abs=1e-6), cell
            assert rank["rates"] == pytest.approx([3e-3 / (1 + STEPS)] * len(rank["rates"]))


def test_every_tensor_comes_back_bit_for_bit(results):
    check_tensors(results)
    assert len(results) == 5


def test_logits_are_equal_bit_for_bit(results):
    check_logits(results)


def test_the_next_steps_are_those_of_the_run_that_went_on(results):
    check_next_steps(results)


@pytest.mark.slow
def test_every_other_layout(more_results):
    assert len(more_results) == 2 + 4 + 3
    check_tensors(more_results)
    check_logits(more_results)
    check_next_steps(more_results)


def refuse(rank, world_size, folders):
    """What each rank says of damaged checkpoints; nothing waits for anyone."""
    from mm_moe.errors import CheckpointError

    said = []
    for folder in folders:
        run = Run(rank, world_size, ep_size=2, stage=2, seed=2)
        with pytest.raises(CheckpointError) as caught:
            run.restore(folder)
        said.append(str(caught.value))
    return said


def test_every_rank_refuses_a_checkpoint_that_lacks_an_expert_or_has_one_twice(saved, tmp_path):
    damages = {"model": "", "optimizer": "exp_avg/"}
    for file in damages:
        shutil.copytree(Path(saved[0], STEP), tmp_path / file / STEP)
        path = tmp_path / file / STEP / f"{file}.safetensors"
        tensors = load_file(path)
        name = next(k for k in tensors if k.endswith("experts.b_in"))
        last = tensors[name][-1:]
        tensors[name] = torch.cat([tensors[name], last]) if file == "model" else last.clone()
        save_file(tensors, path)
    ranks = run_distributed(refuse, 2, [str(tmp_path / file) for file in damages])
    assert ranks[0] == ranks[1]
    for (file, prefix), said, count in zip(damages.items(), ranks[0], (9, 1), strict=True):
        assert str(tmp_path / file / STEP / f"{file}.safetensors") in said
        assert f"'{prefix}" in said
        assert f"holds {count} experts, the model has 8" in said
