"""Peak bytes of the tensors that a piece of code creates, on any device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakMemory(TorchDispatchMode):
    """Counts the storages that come out of operators, until they are freed.

    An allocator-level count for the GPU alone would leave the CPU without one; the process' peak
    size never goes down, so it cannot compare two layers. Scratch memory inside an operator is not
    seen. Tensors that existed before are not counted.

    Attributes:
        peak: the most bytes that lived at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        before = {_key(tensor) for tensor in tree_iter((args, kwargs)) if _is_dense(tensor)}
        out = func(*args, **kwargs)
        for tensor in tree_iter(out):
            if _is_dense(tensor) and _key(tensor) not in before | self._seen:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _is_dense(value: Any) -> bool:
    """Whether a value is a tensor with storage; one on the meta device has only a shape."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
