"""The memory and arithmetic of one micro-batch, measured on a model without storage.

The model's real forward and backward pass run on fake tensors: every operator runs its shape rules
and nothing is computed or allocated. A recorder follows the bytes of all live tensors from operator
to operator. Bytes at each moment are linear in the rows of the batch, so that a few recordings give
the curve of every batch size.

What depends on values in a real pass is planned (`mm_moe.training.planned`).

B samples, M modalities, N rows of one modality, Q recordings, V moments (one per allocation).
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mm_moe.batch import IMAGE, TEXT, Batch, base_modality
from mm_moe.training.planned import Workload, fake_weights

# Samples and rows of a recording; as primes, no number of tokens is one of samples.
SAMPLES, ROWS = 211, 199
BACKWARD = ""  # the mark of the start of the backward pass

Objective = Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor], Any]]


class Recorder(TorchDispatchMode):
    """Follows live bytes and counts multiplications; answers what only values could answer.

    Args:
        padding: tokens of the batch that a mask takes away.
        samples: B; of a mask over samples nothing is chosen, as only generating prompts ask for one
            and those are not planned.
        weights: tensors that are there before; not counted.
    """

    def __init__(self, padding: int, samples: int, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.padding, self.samples = padding, samples
        self.live = self.flops = 0
        self.history: list[int] = []
        self._seen = {_key(tensor) for tensor in weights}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run one operator on shapes."""
        kwargs = kwargs or {}
        out = self._planned(func, args, kwargs)
        if out is None:
            out = func(*args, **kwargs)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **kwargs, out_val=out))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and _key(tensor) not in self._seen:
                self._count(tensor.untyped_storage())
        return out

    def _planned(self, func: Any, args: tuple, kwargs: dict) -> Tensor | None:
        """The outcome of an operator whose shape depends on values."""
        if func is torch.ops.aten.bincount.default:
            least = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
            return args[0].new_empty(least, dtype=torch.int64)
        if func is torch.ops.aten.nonzero.default:
            size = args[0].numel()
            rows = 0 if size == self.samples else max(0, size - self.padding)
            return args[0].new_empty(rows, args[0].ndim, dtype=torch.int64)
        return None

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self.live += size
        self.history.append(self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass
class Recording:
    """One fake pass.

    Attributes:
        live: bytes of inputs and activations after each allocation (V,).
        marks: (moment, parameter name) where a parameter's gradient was complete.
        flops: multiplications and additions, forward and backward.
        end: bytes that are left.
    """

    live: list[int]
    marks: list[tuple[int, str]]
    flops: int
    end: int


@dataclass
class Timeline:
    """Bytes of inputs and activations through a micro-batch, for any number of rows.

    Attributes:
        modalities: in the order of the model.
        live_QV: per unit: constant, per sample, per row of each modality; Q = 2 + M.
        end_Q: bytes left at the end, likewise.
        flops_Q: floating-point operations, likewise.
        marks: (moment, parameter name) where a parameter's gradient was complete, in order; the
            first one is that of the loss, with the name `BACKWARD`.
    """

    modalities: tuple[str, ...]
    live_QV: np.ndarray
    end_Q: np.ndarray
    flops_Q: np.ndarray
    marks: list[tuple[int, str]] = field(default_factory=list)

    def units(self, samples: int, rows: dict[str, int]) -> np.ndarray:
        """What the coefficients are multiplied with."""
        return np.array([1, samples, *(rows[name] for name in self.modalities)], dtype=np.float64)

    def live(self, samples: int, rows: dict[str, int]) -> np.ndarray:
        """Bytes (V,) at each moment."""
        return self.units(samples, rows) @ self.live_QV

    def end(self, samples: int, rows: dict[str, int]) -> float:
        """Bytes left when the backward pass is over: inputs, outputs, loss."""
        return float(self.units(samples, rows) @ self.end_Q)

    def flops(self, samples: int, rows: dict[str, int]) -> float:
        """Floating-point operations of the micro-batch, forward and backward."""
        return float(self.units(samples, rows) @ self.flops_Q)


def record_timeline(
    build: Callable[[], nn.Module], objective: Objective, *, load: Workload
) -> Timeline:
    """Record enough passes to know every batch size.

    Args:
        build: a new model on the meta device, with the experts of one process; called repeatedly.
        objective: as the trainer's.
        load: the shape of the micro-batch.
    """
    first = build()
    modalities: tuple[str, ...] = tuple(first.config.modalities)  # type: ignore[union-attr, arg-type]
    base = {name: ROWS for name in modalities}
    cases = [(SAMPLES, base), (2 * SAMPLES, base)]
    cases += [(SAMPLES, base | {name: 2 * ROWS}) for name in modalities]
    models = [first, *(build() for _ in cases[1:])]
    runs = [
        _record(model, objective, samples=samples, rows=rows, load=load)
        for model, (samples, rows) in zip(models, cases, strict=True)
    ]
    same = {(len(run.live), tuple(name for _, name in run.marks)) for run in runs}
    assert len(same) == 1, "passes of different batch sizes run different operators"
    tables = [
        np.array([value(run) for run in runs], dtype=np.float64)
        for value in (lambda run: run.live, lambda run: run.end, lambda run: run.flops)
    ]
    live_QV, end_Q, flops_Q = (_coefficients(table) for table in tables)
    return Timeline(modalities, live_QV, end_Q, flops_Q, runs[0].marks)


def _coefficients(table: np.ndarray) -> np.ndarray:
    """Constant and slopes, from the first case and those with one unit doubled at a time."""
    steps = np.array([SAMPLES] + [ROWS] * (len(table) - 2), dtype=np.float64)
    slopes = (table[1:] - table[:1]) / steps.reshape(-1, *[1] * (table.ndim - 1))
    constant = table[0] - np.tensordot(steps, slopes, axes=1)
    return np.concatenate([constant[None], slopes])


def _record(
    model: nn.Module, objective: Objective, *, samples: int, rows: dict[str, int], load: Workload
) -> Recording:
    """One fake forward and backward pass; the model is used up."""
    texts = 0 if TEXT in load.sequences else rows.get(TEXT, 0)
    padding = round(texts * (load.text_tokens - load.real_text_tokens))
    with FakeTensorMode():
        _materialise(model, load=load, rows=rows)
        recorder = Recorder(padding, samples, [*model.parameters(), *model.buffers()])
        return record_step(
            recorder, model.train(), objective, lambda: _batch(samples, rows, load=load)
        )


def record_step(
    recorder: Recorder, model: nn.Module, objective: Objective, make_batch: Callable[[], Any]
) -> Recording:
    """A forward and a backward pass; a gradient is handed over as soon as it is complete.

    Args:
        recorder: knows what was there before.
        model: its gradients are taken away.
        objective: as the trainer's.
        make_batch: called within the recording, so that the batch counts.
    """
    marks: list[tuple[int, str]] = []
    gc.disable()  # a collection in the middle would move the moment at which bytes go
    try:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = None
                mark = functools.partial(_mark, recorder, marks, name)
                parameter.register_post_accumulate_grad_hook(mark)
        with recorder:
            batch = make_batch()
            loss, parts, output = objective(model, batch)
            recorder.history.append(recorder.live)
            marks.append((len(recorder.history) - 1, BACKWARD))
            loss.backward()
            del parts
            end = recorder.live
            del output, loss, batch
    finally:
        gc.enable()
    return Recording(recorder.history, marks, recorder.flops, end)


def _mark(recorder: Recorder, marks: list[tuple[int, str]], name: str, parameter: Tensor) -> None:
    """Note when a gradient is complete, and hand it over: what holds it depends on the stage."""
    recorder.history.append(recorder.live)
    marks.append((len(recorder.history) - 1, name))
    parameter.grad = None


def _materialise(model: nn.Module, *, load: Workload, rows: dict[str, int]) -> None:
    """Give a meta model fake weights on the host, planned dispatch and planned rows."""
    fake_weights(model, load=load)
    vars(model)["_packed_rows"] = lambda present, inputs: {
        name: torch.arange(count) for name, count in rows.items()
    }
    model.backbone.set_recompute(load.recompute_every)  # type: ignore[union-attr, operator]


def _batch(samples: int, rows: dict[str, int], *, load: Workload) -> Batch:
    """A fake batch with these rows."""
    inputs: dict[str, dict[str, Tensor]] = {}
    for name, count in rows.items():
        if name in load.sequences:
            steps, width = load.sequences[name]
            values = torch.empty(count, steps, width, dtype=torch.bfloat16 if load.half else None)
            inputs[name] = {"values": values, "mask": torch.empty(count, steps, dtype=torch.bool)}
        elif name in load.arrays:
            values = torch.empty(count, *load.arrays[name])
            inputs[name] = {"values": values.bfloat16() if load.half else values}
        elif base_modality(name) == IMAGE:
            pixels = torch.empty(count, 3, load.image_size, load.image_size)
            inputs[name] = {"pixel_values": pixels.bfloat16() if load.half else pixels}
            if load.keep_inputs:
                inputs[name] = {**inputs[name], "pixels": pixels}
        else:
            ids = torch.empty(count, load.text_tokens, dtype=torch.int64)
            inputs[name] = {"input_ids": ids, "attention_mask": torch.empty_like(ids)}
    labels = None
    if load.outputs and load.problem_type == "single_label_classification":
        labels = torch.empty(samples, dtype=torch.int64)
    elif load.outputs:
        wide = {"multi_label_classification": (load.outputs,), "survival": (2,)}
        labels = torch.empty((samples, *wide.get(load.problem_type, ())))
    present = torch.empty(samples, len(rows), dtype=torch.bool)
    return Batch.of([""] * samples, present, inputs, labels)
