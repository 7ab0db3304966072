"""Training on less than there is: complete rows alone, and modality dropout."""

from dataclasses import replace

import pytest
import torch

from mm_moe.batch import Sample
from mm_moe.data.complete_rows import CompleteRows
from mm_moe.data.missing import MissingProtocol
from mm_moe.data.modality_dropout import ModalityDropout
from mm_moe.data.streaming import SampleStream
from mm_moe.errors import ConfigError, DataError
from tests.patchy import EMPTY, NO_IMAGE, NO_TEXT, NUM_ROWS, Patchy

torch.set_num_threads(1)


def test_training_keeps_complete_rows_alone_and_the_rest_of_the_data_stays():
    source = Patchy()
    kept = CompleteRows(source, split="train", missing=None)
    without = {*NO_IMAGE, *NO_TEXT, *EMPTY}
    assert (kept.num_complete, kept.num_dropped) == (NUM_ROWS - len(without), len(without))
    assert kept.size("train") == NUM_ROWS - len(without)
    assert kept.size("test") == NUM_ROWS
    stream = SampleStream(kept, split="train", batch_size=4, epochs=1)
    whole = [f"row-{number}" for number in range(NUM_ROWS) if number not in without]
    assert [sample.id for sample in stream] == whole
    assert [sample.id for sample in kept.index("train")] == whole
    assert kept.fingerprint() == source.fingerprint()


def test_rows_that_the_mask_makes_incomplete_are_left_out_too():
    mask = MissingProtocol(dataset="patchy", split="train", kind="text", ratio=0.5)
    kept = CompleteRows(Patchy(), split="train", missing=mask)
    ids = [sample.id for sample in kept.index("train")]
    assert 0 < len(ids) < NUM_ROWS - 5
    assert mask.present(ids, ("image", "text")).all()


def test_a_split_without_a_complete_row_is_refused():
    mask = MissingProtocol(dataset="patchy", split="train", kind="text", ratio=1.0)
    with pytest.raises(DataError, match=r"--drop_incomplete true leaves no row of split 'train'"):
        CompleteRows(Patchy(), split="train", missing=mask)


def test_modality_dropout_takes_its_share_by_epoch_and_never_everything():
    samples = [Sample(f"s{n}", {}, 0) for n in range(2000)]
    present = torch.ones(2000, 3, dtype=torch.bool)
    present[:, 2] = False
    drop = ModalityDropout(rate=0.3, dataset="toy")
    left = drop(samples, present)
    assert not left[:, 2].any()  # nothing comes back
    assert left.any(1).all()
    # each of two goes by a chance of 0.3, and comes back where both went (0.09)
    assert left[:, 0].float().mean().item() == pytest.approx(0.7 + 0.09, abs=0.03)
    assert torch.equal(left[7:9], drop(samples[7:9], present[7:9]))  # a row's own
    later = drop([replace(sample, epoch=1) for sample in samples], present)
    assert not torch.equal(left, later)
    assert torch.equal(ModalityDropout(rate=0.0, dataset="toy")(samples, present), present)
    with pytest.raises(ConfigError, match=r"--modality_dropout 1.0 must lie in \[0, 1\)"):
        ModalityDropout(rate=1.0, dataset="toy")
