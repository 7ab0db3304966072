"""Clock and counter of training steps: which time counts, and operations as torch counts them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mm_moe.batch import Batch
from mm_moe.models.configuration import MultimodalMoEConfig
from mm_moe.models.modeling import MultimodalMoEModel
from mm_moe.training import throughput
from mm_moe.training.throughput import Peak, Sums, Throughput, matmul_rate, rates

TEXT = 12


def new_model(**moe) -> MultimodalMoEModel:
    torch.manual_seed(0)
    small = {"patch_size": 16, "num_blocks": 2, "width": 32, "num_heads": 2, "hidden": 64}
    config = MultimodalMoEConfig(
        backbone="small_clip",
        backbone_config=small,
        modalities=["image", "text"],
        num_labels=3,
        problem_type="single_label_classification",
        **moe,
    )
    return MultimodalMoEModel(config).train()


def new_batch(model) -> Batch:
    """Two samples, the second without its image; 3 of 2 x 12 positions of text are padding."""
    image = model.backbone.towers["image"].blank()
    words = torch.ones(2, TEXT, dtype=torch.long)
    mask = torch.ones(2, TEXT, dtype=torch.long)
    mask[1, -3:] = 0
    inputs = {"image": image, "text": {"input_ids": words, "attention_mask": mask}}
    present = torch.tensor([[True, True], [False, True]])
    return Batch.of(["a", "b"], present, inputs, torch.tensor([0, 1]))


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets, and a device that needs no measuring."""
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(throughput, "device_peak", lambda device, half: Peak(1e9, known=False))
    return now


def one_step(watch, clock, *, wait_s: float, work_s: float, batch: Batch | None = None) -> None:
    with watch.waiting():
        clock[0] += wait_s
    with watch.training_pass(batch or Batch.of(["a"], torch.ones(1, 1, dtype=torch.bool), {})):
        clock[0] += work_s
    watch.on_step_end(None, None, None)


def test_the_first_step_and_what_lies_between_steps_do_not_count(clock):
    watch = Throughput(torch.nn.Linear(2, 2), half=False)
    watch.on_train_begin(None, None, None)
    clock[0] += 50  # what starts before the first batch
    one_step(watch, clock, wait_s=30, work_s=20)
    assert watch.take().steps == 0
    one_step(watch, clock, wait_s=1, work_s=3)
    clock[0] += 600  # an evaluation and a checkpoint
    one_step(watch, clock, wait_s=2, work_s=2)
    sums = watch.take()
    assert (sums.steps, sums.busy_s, sums.waited_s, sums.rows) == (2, 8.0, 3.0, 2)
    assert rates([sums])["perf/data_wait_share"] == 0.375
    assert watch.take().steps == 0  # the sums began anew


def test_a_resumed_training_forgets_its_first_step_too(clock):
    watch = Throughput(torch.nn.Linear(2, 2), half=False)
    for _ in range(2):
        watch.on_train_begin(None, None, None)
        one_step(watch, clock, wait_s=30, work_s=20)
        one_step(watch, clock, wait_s=1, work_s=1)
        assert watch.take().busy_s == 2.0
        watch.on_train_end(None, None, None)


@pytest.mark.parametrize("moe", [{"moe": None}, {"moe": {"num_experts": 4, "top_k": 2}}])
def test_operations_as_torch_counts_them(clock, moe):
    model = new_model(**moe, moe_layers=None)
    batch, watch = new_batch(model), Throughput(model, half=False)
    watch.on_train_begin(None, None, None)
    watch._warm = True
    with watch.waiting():
        clock[0] += 1.0
    with FlopCounterMode(display=False) as counted:
        with watch.training_pass(batch):
            output = model(batch.present, batch.inputs)
        output.logits.square().sum().backward()
    watch.on_step_end(None, None, None)
    sums = watch.take()
    # torch counts that the backward pass of attention forms the scores once more
    again = 2 * sum(n * length**2 for n, length in ((1, _patches(model)), (2, TEXT))) * 32 * 2
    ours, theirs = sums.flops + again, counted.get_total_flops()
    if moe["moe"] is None:
        assert ours == theirs
    else:  # the router's small product is not in ours
        assert 0.99 * theirs < ours < theirs
    assert sums.tokens == _patches(model) + 2 * TEXT - 3
    watch.on_train_end(None, None, None)
    with watch.training_pass(batch):
        model(batch.present, batch.inputs)
    assert watch.take().flops == 0  # no hook is left


def _patches(model) -> int:
    tower = model.backbone.towers["image"]
    return tower.embed(tower.blank())[0].shape[1]


def test_a_frozen_weight_costs_no_gradient_and_another_pass_does_not_count(clock):
    layer = torch.nn.Linear(3, 5).requires_grad_(False)
    watch = Throughput(layer, half=False)
    watch.on_train_begin(None, None, None)
    batch = Batch.of(["a"], torch.ones(1, 1, dtype=torch.bool), {})
    layer(torch.ones(7, 3))  # an evaluation
    with watch.training_pass(batch):
        layer(torch.ones(7, 3))
    assert watch.take().flops == 2 * 7 * 3 * 5
    with watch.training_pass(batch):
        layer(torch.ones(7, 3, requires_grad=True))
    assert watch.take().flops == 2 * (2 * 7 * 3 * 5)


def test_a_gpu_of_the_table_gives_mfu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    peak = throughput.device_peak(torch.device("cuda"), half=True)
    assert peak == Peak(756e12, known=True)
    assert throughput.device_peak(torch.device("cuda"), half=False).flops_per_s == 378e12
    one = Sums(10, 2.0, 0.0, 80, 0.0, 756e12, 0, peak)
    assert rates([one, one])["perf/mfu"] == 0.5
    assert "perf/matmul_share" not in rates([one])


def test_the_measured_rate_draws_no_random_number():
    before = torch.get_rng_state()
    assert 1e8 < matmul_rate(torch.device("cpu"), half=False) < 1e14
    assert torch.equal(before, torch.get_rng_state())
