"""What comes home from loader workers: bad samples, errors in one line, deaths."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from toy import Numbers

from mm_moe.batch import Sample
from mm_moe.data.collate import BAD, Collator
from mm_moe.data.loading import SampleLoader, worker_death
from mm_moe.data.retrying import GoneError
from mm_moe.data.streaming import SampleStream
from mm_moe.errors import DataError
from mm_moe.training.preemption import ignore_in_worker


class BadNumbers(Numbers):
    """Rows whose picture is nowhere, of which some are worse."""

    modalities = ("image", "text")
    then = staticmethod(lambda number: None)  # what happens when a worker meets a number

    def to_sample(self, row):
        self.then(row["number"])
        image = {"image": Path("/nowhere") / row["id"]} if row["number"] % 3 == 0 else {}
        return Sample(row["id"], {"text": "x", **image}, 0)


def loader(tmp_path, *, workers, rows=12, epochs=2):
    collate = Collator(
        modalities=("image", "text"),
        processors={
            name: lambda found: {"n": torch.ones(len(found))} for name in ("image", "text")
        },
        problem_type="none",
        num_labels=0,
    )
    source = BadNumbers.write(tmp_path, rows=rows)
    stream = SampleStream(source, split="train", batch_size=2, epochs=epochs)
    return SampleLoader(stream, batch_size=2, num_workers=workers, collate_fn=collate)


def test_closing_ends_workers_that_ignore_signals(tmp_path):
    stream = loader(tmp_path, workers=0).dataset
    found = SampleLoader(
        stream,
        batch_size=2,
        num_workers=2,
        collate_fn=loader(tmp_path, workers=0).collate_fn,
        worker_init_fn=ignore_in_worker,
        persistent_workers=True,
    )
    next(iter(found))
    assert len(multiprocessing.active_children()) == 2
    found.close()
    assert not multiprocessing.active_children()
    found.close()  # twice does no harm


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_ids_come_home_with_the_batch_that_met_them(tmp_path, workers):
    found = loader(tmp_path, workers=workers)
    known = []
    for batch in found:
        assert BAD not in batch
        known.append(list(found.collate_fn.bad))
    # batches of two: 0 in the first, 3 in the second, 6 in the fourth, 9 in the fifth; then again
    first = [["0"], ["0", "3"], ["0", "3"], ["0", "3", "6"]] + [["0", "3", "6", "9"]] * 8
    assert known == first
    assert set(found.collate_fn.bad.values()) == {"FileNotFoundError"}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_is_one_line_wherever_it_was_raised(tmp_path, monkeypatch, workers):
    def fail(number):
        if number == 5:
            raise GoneError("http://host/x cannot be read: status 404.")

    monkeypatch.setattr(BadNumbers, "then", staticmethod(fail))
    with pytest.raises(GoneError) as told:
        list(loader(tmp_path, workers=workers))
    assert str(told.value) == "http://host/x cannot be read: status 404."


def read_as_the_trainer(found):
    try:
        list(found)
    except RuntimeError as error:  # torch's handler may raise while its first error is told
        raise worker_death(error, num_workers=found.num_workers) from None


@pytest.mark.faults
def test_a_worker_that_is_killed_is_told_in_one_line(tmp_path, monkeypatch):
    def die(number):
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(BadNumbers, "then", staticmethod(die))
    with pytest.raises(DataError, match=r"a process that loads data died \(DataLoader") as told:
        read_as_the_trainer(loader(tmp_path, workers=1))
    assert "\n" not in str(told.value)
    assert "--dataloader_num_workers" in str(told.value)


def lost(error):
    def fetch(_):
        raise error

    return fetch


@pytest.mark.parametrize(
    "error", [EOFError(), ConnectionResetError(104, "reset"), FileNotFoundError(2, "no socket")]
)
def test_a_worker_that_dies_before_it_hands_a_batch_over_is_told_too(tmp_path, monkeypatch, error):
    found = loader(tmp_path, workers=1)
    monkeypatch.setattr("torch.utils.data.dataloader._BaseDataLoaderIter.__next__", lost(error))
    with pytest.raises(DataError, match=f"closed its connection: {type(error).__name__}"):
        list(found)


@pytest.mark.parametrize(("workers", "text"), [(0, "x"), (1, "Caught OSError in DataLoader w")])
def test_a_file_that_fails_is_not_taken_for_a_dead_worker(tmp_path, monkeypatch, workers, text):
    found = loader(tmp_path, workers=workers)
    fetch = lost(OSError(text))
    monkeypatch.setattr("torch.utils.data.dataloader._BaseDataLoaderIter.__next__", fetch)
    with pytest.raises(OSError, match=text):
        list(found)
