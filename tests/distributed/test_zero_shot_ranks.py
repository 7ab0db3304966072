"""Zero-shot scores do not depend on the number of processes, nor on batches that do not divide."""

import pytest
import torch

from launch.zero_shot import ZeroShot
from mm_moe.batch import IMAGE, TEXT, Sample
from mm_moe.data.sets.emoji import EmojiData
from mm_moe.data.unlabelled import Unlabelled
from mm_moe.models.building import build_model
from mm_moe.models.configuration import MultimodalMoEConfig
from mm_moe.models.processing import processors_for
from mm_moe.moe.parallel import make_expert_parallel
from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed


class Few(EmojiData):
    """Every thirtieth test emoji; some lack the picture, some the name."""

    def stream(self, split):
        rows = list(super().stream(split).take(300))[::30]
        import datasets

        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    def size(self, split):
        return 10

    def to_sample(self, row) -> Sample:
        sample = super().to_sample(row)
        lost = {"0": IMAGE, "1": TEXT}.get(str(hash_of(sample.id) % 3))
        sample.payload.pop(lost, None)
        return sample


def hash_of(text: str) -> int:
    return sum(text.encode())


def scores(rank: int, world_size: int) -> list[dict]:
    torch.manual_seed(0)
    shape = {"patch_size": 16, "num_blocks": 2, "width": 32, "num_heads": 2, "hidden": 64}
    config = MultimodalMoEConfig(
        backbone="small_clip",
        backbone_config=shape,
        modalities=[IMAGE, TEXT],
        moe={"num_experts": 4},
        moe_layers=[0, 1],
        num_labels=0,
    )
    model = build_model(config)
    make_expert_parallel(model, ep_size=world_size)
    scorer = ZeroShot(
        model,
        Unlabelled(Few()),
        processors_for(config, source="builtin"),
        batch_size=3,
        max_bad_samples=0,
        classes=Few(),
        templates=("{}", "a drawing of {}"),
    )
    return [row.metrics | {"rows": row.num_rows} for row in scorer.rows("test")]


def test_two_processes_score_as_one():
    (alone,) = run_distributed(scores, 1)
    first, second = run_distributed(scores, 2)
    assert first == second
    assert [set(row) for row in first] == [set(row) for row in alone]
    for ours, whole in zip(first, alone, strict=True):
        assert ours == pytest.approx(whole, abs=1e-9)
    assert 0 < alone[0]["rows"] < alone[1]["rows"] < 10  # some lack the name, some the picture
