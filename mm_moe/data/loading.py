"""Batches from loader workers: their findings brought home, their ends told in one line."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

from torch.utils.data import DataLoader

from mm_moe.batch import Batch
from mm_moe.data.collate import BAD, Collator
from mm_moe.errors import DataError, MMMoEError


class SampleLoader(DataLoader):
    """A `DataLoader` of samples with a `Collator`, which it tells of the workers' bad samples.

    Raises:
        MMMoEError: of a worker, as it was there, without its traceback.
        DataError: a worker died.
    """

    collate_fn: Collator

    def close(self) -> None:
        """End the workers. At the end of a program they would only be asked by a SIGTERM.

        Workers that live on through signals (`mm_moe.training.preemption`) would ignore it, and the
        program would wait for them for good.
        """
        if self._iterator is not None:
            self._iterator._shutdown_workers()  # type: ignore[attr-defined]
            self._iterator = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        failure: MMMoEError
        try:
            for batch in super().__iter__():
                self.collate_fn.remember(batch.pop(BAD, {}))
                yield batch
            return
        except MMMoEError as error:
            failure = _plain(error)
        except RuntimeError as error:
            failure = worker_death(error, num_workers=self.num_workers)
        except (EOFError, OSError) as error:
            failure = _lost_handle(error, num_workers=self.num_workers)
        raise failure  # not above: the traceback there keeps the dead workers' iterator alive


def worker_death(error: RuntimeError, *, num_workers: int) -> DataError:
    """The error to raise for one of torch, which may come at any time while workers live.

    torch's handler of SIGCHLD is taken away: it would raise again in the midst of what follows.

    Raises:
        RuntimeError: the same, if it tells of no worker's death.
    """
    if "DataLoader worker" not in str(error):
        raise error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return _death(str(error).split("\n")[0].rstrip(". "), num_workers=num_workers)


def _lost_handle(error: EOFError | OSError, *, num_workers: int) -> DataError:
    """The error of a worker that died between sending a batch and handing its memory over.

    The batch comes through a queue, the handles of its tensors through a socket of the worker: this
    process then meets the end of a file, a closed connection or a missing socket instead of
    torch's own words.

    Raises:
        EOFError, OSError: the same, if it was raised within a worker or there are none.
    """
    if not num_workers or "Caught " in str(error):
        raise error
    why = f"DataLoader worker closed its connection: {type(error).__name__}"
    return worker_death(RuntimeError(why), num_workers=num_workers)


def _death(why: str, *, num_workers: int) -> DataError:
    return DataError(
        f"a process that loads data died ({why}), mostly because memory ran out: each of the "
        f"{num_workers} workers holds its own shuffle buffer. Lower --dataloader_num_workers or "
        "--shuffle_buffer, or ask for more memory."
    )


def _plain(error: MMMoEError) -> MMMoEError:
    """An error that torch wrapped in the text of a worker's traceback, as it was."""
    kind = type(error)
    _, found, text = str(error).rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")
    return kind(text.strip()) if found else error
