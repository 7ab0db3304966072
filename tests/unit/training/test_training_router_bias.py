"""The balancing bias by hand, and batches without a token."""

from types import SimpleNamespace

import pytest
import torch
from torch import tensor
from torch.utils.checkpoint import checkpoint

from mm_moe.batch import Batch
from mm_moe.errors import DataError
from mm_moe.moe.layer import MoELayer, RoutingRecord
from mm_moe.moe.router import TopKSoftmaxRouter
from mm_moe.moe.router_sigmoid import TopKSigmoidRouter
from mm_moe.moe.settings import MoESettings
from mm_moe.training import trainer
from mm_moe.training.router_bias import BiasUpdate


def layer_of(rate=0.25):
    torch.manual_seed(0)
    settings = MoESettings(num_experts=3, bias_update_rate=rate)
    return MoELayer(width=2, hidden=3, settings=settings)


def loads(*load_E):
    return {"image.1": RoutingRecord(tensor(load_E), {}, {}, tensor(load_E))}


def test_a_step_moves_each_bias_once_by_the_load_of_all_its_passes():
    layer = layer_of()
    update = BiasUpdate({"image.1": layer})
    update.add(loads(5, 0, 0))
    update.add(loads(0, 3, 1))
    update.on_step_end(None, None, None)
    # loads 5 3 1, mean 3
    assert layer.router.bias_steps.tolist() == [-1, 0, 1]
    update.on_step_end(None, None, None)  # nothing new: nothing moves
    assert layer.router.bias_steps.tolist() == [-1, 0, 1]
    update.add(loads(4, 0, 0))
    update.on_step_end(None, None, None)
    assert layer.router.bias_steps.tolist() == [-2, 1, 2]


def test_a_forward_pass_alone_moves_nothing():
    layer = layer_of()
    layer(torch.randn(9, 2))
    layer.eval()(torch.randn(9, 2))
    assert layer.router.bias_steps.tolist() == [0, 0, 0]


def test_recomputed_passes_do_not_count():
    layer = layer_of()
    update = BiasUpdate({"image.1": layer})
    passes = []
    layer.router.register_forward_hook(lambda *call: passes.append(call))
    y_TD, record = checkpoint(layer, torch.randn(9, 2, requires_grad=True), use_reentrant=False)
    update.add({"image.1": record})
    y_TD.sum().backward()
    assert len(passes) == 2
    assert update._load["image.1"].sum() == 9


def test_layers_without_a_rate_are_left_alone():
    layer = layer_of(rate=0.0)
    update = BiasUpdate({"image.1": layer})
    update.add({})
    update.on_step_end(None, None, None)
    assert "router.bias_steps" not in layer.state_dict()


@pytest.mark.parametrize("kind", [TopKSoftmaxRouter, TopKSigmoidRouter])
def test_the_bias_changes_the_choice_and_not_the_weight(kind):
    router = kind(width=1, settings=MoESettings(num_experts=2, top_k=2, bias_update_rate=0.25))
    router.weight.data = tensor([[1.0], [0.0]])
    before = router(torch.ones(1, 1))
    router.bias_steps.copy_(tensor([-1, 2]))  # -.25 and .5: more than any two scores differ
    after = router(torch.ones(1, 1))
    assert (before.expert_TK.tolist(), after.expert_TK.tolist()) == ([[0, 1]], [[1, 0]])
    assert torch.equal(after.weight_TK, before.weight_TK.flip(-1))
    assert torch.equal(after.prob_TE, before.prob_TE)


def test_bf16_leaves_the_bias_as_it_is():
    layer = layer_of(rate=0.001)
    layer.router.bias_steps.copy_(tensor([1001, -3, 7]))  # bf16 would make 1000 of 1001
    layer.to(torch.bfloat16).to(torch.float32)
    biased = layer.router.biased(torch.zeros(1, 3))
    torch.testing.assert_close(biased, tensor([[1.001, -0.003, 0.007]]))


def test_the_bias_evens_out_a_skewed_load():
    layer = layer_of(rate=0.005)
    layer.router.weight.data = tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    update = BiasUpdate({"image.1": layer})
    torch.manual_seed(0)
    shares = []
    for _ in range(150):
        _, record = layer(torch.rand(300, 2) + 0.5)
        update.add({"image.1": record})
        update.on_step_end(None, None, None)
        shares.append(record.tokens_E.max().item() / 300)
    assert shares[0] == 1
    assert sum(shares[-10:]) / 10 < 0.6


def batch_of(present):
    return Batch.of(["a", "b"], tensor(present), {})


def record_of(tokens):
    return RoutingRecord(tensor([0]), {}, {"tokens": tensor(float(tokens))})


def test_a_batch_without_a_token_is_refused(monkeypatch):
    nothing = batch_of([[False, False], [False, False]])
    routing = {"image.1": record_of(0), "text.1": record_of(0)}
    with pytest.raises(DataError, match=r"2 samples.*'a', 'b'.*other 0 proc.*--global_batch_size"):
        trainer.refuse_empty(nothing, routing)
    trainer.refuse_empty(nothing, {"image.1": record_of(0), "text.1": record_of(4)})
    trainer.refuse_empty(nothing, {})
    trainer.refuse_empty(batch_of([[False, True], [False, False]]), {"image.1": record_of(0)})
    monkeypatch.setattr(trainer, "runtime", SimpleNamespace(any_rank=lambda mine: True))
    trainer.refuse_empty(nothing, routing)  # another rank has tokens in a dense tower
