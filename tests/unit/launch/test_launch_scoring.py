"""Many conditions scored from one look at each remainder of a sample."""

import numpy as np
import pytest

from mm_moe.data.missing import MissingProtocol
from mm_moe.errors import DataError
from mm_moe.moe.layer import couples_samples
from tests.patchy import BROKEN, model_of, scorer_of

CONDITIONS = [("none", 0.0), *((k, r) for k in ("text", "image", "both") for r in (0.5, 0.9, 1.0))]
PROTOCOLS = [
    MissingProtocol(dataset="patchy", split="test", kind=kind, ratio=ratio)
    for kind, ratio in CONDITIONS
]
PROTOCOLS[0] = None


class Counting:
    """Stands for a model and counts the rows that it is shown."""

    def __init__(self, model):
        self.rows = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _, args, kwargs):
        self.rows += len(kwargs["present"])


@pytest.mark.parametrize("router", ["topk_softmax", "soft_slots", "by_combination"])
def test_composed_equals_a_pass_per_condition(router):
    model = model_of(router=router, num_experts=6)
    scorer, counted = scorer_of(model), Counting(model)
    assert not couples_samples(model)
    composed = list(scorer.predict_all(PROTOCOLS, "test"))
    assert counted.rows <= 3 * 40
    for protocol, found in zip(PROTOCOLS, composed, strict=True):
        direct = scorer.predict(protocol, "test")
        assert found.ids == direct.ids
        assert np.array_equal(found.present, direct.present)
        assert np.array_equal(found.labels, direct.labels)
        np.testing.assert_allclose(found.logits, direct.logits, rtol=0, atol=1e-6)
    assert scorer.bad_ids == [f"row-{n}" for n in sorted(BROKEN, key=str)]


@pytest.mark.parametrize("moe", [{"drop_tokens": True}, {"router": "expert_choice"}], ids=str)
def test_coupled_samples_take_a_pass_per_condition(moe):
    model = model_of(**moe)
    scorer, counted = scorer_of(model), Counting(model)
    assert couples_samples(model)
    found = list(scorer.predict_all(PROTOCOLS[:3], "test"))
    assert counted.rows == 3 * 40
    direct = scorer.predict(PROTOCOLS[2], "test")
    assert np.array_equal(found[2].logits, direct.logits)


def test_too_many_broken_images_stop_the_scoring():
    with pytest.raises(DataError, match="2 samples have an image that does not decode"):
        scorer_of(model_of(), max_bad_samples=1).predict_all(PROTOCOLS, "test")
