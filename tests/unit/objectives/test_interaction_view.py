"""What an interaction expert and a fuser see of their training data, and where they start."""

import itertools

import numpy as np
import pytest
import torch

from finetune.interaction_view import REJECT, view_of
from mm_moe.data.interactions.table import table_of
from mm_moe.data.sets.emoji import EmojiData
from mm_moe.data.streaming import SampleStream
from mm_moe.errors import ConfigError, DataError
from mm_moe.models import MultimodalMoEConfig, build_model
from mm_moe.models.take_head import take_head
from tests.unit.models.test_modeling import SMALL

EMOJI = EmojiData()
SAMPLES = {split: list(EMOJI.index(split)) for split in ("train", "test")}
KINDS = ("R", "U_image", "U_text", "AS")


def kind_of(place: int) -> str:
    return KINDS[place % 4]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A table in which sample n of each split has category n % 4."""
    rows = [
        (split, sample, kind_of(n))
        for split, samples in SAMPLES.items()
        for n, sample in enumerate(samples)
    ]
    labels = np.array([sample.label for _, sample, _ in rows])
    wrong = (labels + 1) % 9
    right = {
        name: np.array([k in ("R", f"U_{name}") for *_, k in rows]) for name in EMOJI.modalities
    }
    said = {name: np.where(right[name], labels, wrong) for name in EMOJI.modalities}
    table = table_of(
        dataset="emoji",
        label_names=EMOJI.label_names,
        ids=[sample.id for _, sample, _ in rows],
        splits=[split for split, *_ in rows],
        label_N=labels,
        predictions=said,
        probabilities={name: np.eye(9)[codes] for name, codes in said.items()},
        origin={},
    )
    file = tmp_path_factory.mktemp("table") / "interactions.parquet"
    table.save(file)
    return str(file)


def view(path, **flags):
    return view_of(EMOJI, {"train_split": "train", "interaction_table": path, **flags})


def streamed(source, split, count):
    stream = SampleStream(source, split=split, batch_size=1, epochs=1)
    return [(sample.id, sample.label) for sample in itertools.islice(stream, count)]


def pairs(samples):
    return [(sample.id, sample.label) for sample in samples]


@pytest.mark.parametrize(
    ("category", "kinds"), [("R", {"R"}), ("U", {"U_image", "U_text"}), ("U_text", {"U_text"})]
)
def test_an_expert_sees_the_training_rows_of_its_category_alone(path, category, kinds):
    own = [s for n, s in enumerate(SAMPLES["train"]) if kind_of(n) in kinds]
    source = view(path, interaction_subset=category)
    assert pairs(source.index("train")) == pairs(own)
    assert source.size("train") == len(own)
    assert streamed(source, "train", 40) == pairs(own[:40])
    assert streamed(source, "test", 5) == pairs(SAMPLES["test"][:5])
    assert source.label_names == EMOJI.label_names
    # The shuffle sees the same rows, and none of the others.
    shuffled = SampleStream(source, split="train", batch_size=1, epochs=1, shuffle_buffer=50)
    assert sorted(sample.id for sample in shuffled) == sorted(sample.id for sample in own)
    # A second epoch begins behind exactly so many rows.
    late = SampleStream(source, split="train", batch_size=1, epochs=2, start=len(own))
    assert next(iter(late)).id == own[0].id


def test_an_expert_can_see_all_rows_and_tell_those_of_others(path):
    source = view(path, interaction_subset="AS", reject_class=True)
    assert source.label_names == (*EMOJI.label_names, REJECT)
    expected = [
        (s.id, s.label if kind_of(n) == "AS" else 9) for n, s in enumerate(SAMPLES["train"])
    ]
    assert pairs(source.index("train")) == expected
    assert streamed(source, "train", 8) == expected[:8]
    assert streamed(source, "test", 8) == pairs(SAMPLES["test"][:8])


def test_a_fuser_learns_the_categories(path):
    source = view(path, interaction_target=True)
    assert source.label_names == ("R", "U", "AS")
    assert [label for _, label in streamed(source, "train", 5)] == [0, 1, 1, 2, 0]
    assert [s.label for s in itertools.islice(source.index("test"), 4)] == [0, 1, 1, 2]
    assert set(source.unlabelled) == {"validation"}


def test_without_flags_the_data_set_is_itself():
    assert view_of(EMOJI, {"train_split": "train", "interaction_table": None}) is EMOJI


@pytest.mark.parametrize(
    ("flags", "error", "words"),
    [
        ({"reject_class": True}, ConfigError, "--reject_class true needs --interaction_subset"),
        (
            {"interaction_subset": "R", "interaction_target": True},
            ConfigError,
            "leave out --interaction_subset R",
        ),
        ({"interaction_subset": "X"}, ConfigError, "unknown interaction category 'X'; known: AS"),
        ({"interaction_subset": "DS"}, DataError, "no row of split 'train'.*'DS'; there are 759 U"),
        (
            {"interaction_subset": "R", "interaction_table": None},
            ConfigError,
            "--interaction_subset needs --interaction_table FILE",
        ),
        (
            {"interaction_target": True, "train_split": "validation"},
            DataError,
            "samples of split 'validation' are not in the interaction table",
        ),
    ],
)
def test_what_cannot_work_is_refused(path, flags, error, words):
    with pytest.raises(error, match=words):
        view(path, **flags)


def small_model(labels):
    fields = {"backbone_config": SMALL, "modalities": ["text"]}
    return build_model(MultimodalMoEConfig(label_names=labels, **fields))


def test_a_head_goes_on_class_by_class(tmp_path):
    known = small_model(["x", "y"])
    with torch.no_grad():
        known.head.bias.copy_(torch.tensor([1.0, 2.0]))
    known.save_pretrained(tmp_path)
    same = small_model(["x", "y"])
    take_head(same, str(tmp_path))
    assert torch.equal(same.head.weight, known.head.weight)
    wider = small_model(["y", "x", REJECT])
    take_head(wider, str(tmp_path))
    assert wider.head.bias.tolist() == [2, 1, 0]
    assert torch.equal(wider.head.weight[:2], known.head.weight.flip(0))
    assert not wider.head.weight[2].any()
    with pytest.raises(ConfigError, match=r"of which the data .* have none"):
        take_head(small_model(["p", "q"]), str(tmp_path))
