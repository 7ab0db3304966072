"""What a spread sparse layer holds of the model's state, under names that know no layout.

A logical tensor has the name and the shape that it has in a model of one process: experts are
stacked in the order of their global ids. How a rank holds its part of them (as one stack, or as one
parameter per expert) is the layer's business.

E experts, L experts of this process.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor, nn

from mm_moe.errors import ParallelismError
from mm_moe.moe.layer import MoELayer, moe_layers
from mm_moe.moe.parallel_placed import SpreadPlaced, enlarged
from mm_moe.moe.placed import placed_layers

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)
DEEPSPEED_EXPERTS = "deepspeed_moe.experts.deepspeed_experts."  # what DeepSpeed's engine looks for


class SpreadMoE(MoELayer):
    """Base of sparse layers that hold a slice of the experts on each process.

    Attributes:
        ep_size: processes that share the experts.
        expert_group_name: DeepSpeed's name of their process group.
        num_local_experts: L.
    """

    ep_size: int
    expert_group_name: str
    num_local_experts: int

    def _take_part(self, layer: MoELayer, *, ep_size: int) -> None:
        """Take over what does not depend on where the experts are, and make the process groups."""
        self.ep_size = ep_size
        self.expert_group_name = f"ep_size_{ep_size}"
        self.num_experts = layer.num_experts
        self.num_local_experts = layer.num_experts // ep_size
        self.width, self.settings = layer.width, layer.settings
        groups._create_expert_and_data_parallel(ep_size)

    @property
    def first_expert(self) -> int:
        """Global id of the first expert of this process."""
        rank = dist.get_rank(groups._get_expert_parallel_group(self.expert_group_name))
        return rank * self.num_local_experts

    def logical_names(self) -> dict[str, str | None]:
        """Own name -> logical name, of tensors that are held under another one.

        Several own names with one logical name are its experts in order, each as a module of its
        own holds them: a weight is transposed against the stack's. None is a second name of a
        tensor that the logical state has already.
        """
        return {}

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by DeepSpeed's engine; the groups exist since the layer was made.

        Raises:
            ParallelismError: the engine wants expert groups of strided ranks.
        """
        if use_data_before_expert_parallel_:
            raise ParallelismError(
                "use_data_before_expert_parallel is not supported: experts live on consecutive "
                "ranks; remove it from the DeepSpeed file."
            )


def is_expert_parameter(parameter: Tensor) -> bool:
    """Whether DeepSpeed treats a parameter as an expert's (not replicated on all processes)."""
    return not getattr(parameter, "allreduce", True)


def dimensions_of_one(parameter: Tensor) -> int:
    """Dimensions of a parameter; of a stack of experts, those of one expert's share."""
    stacked = is_expert_parameter(parameter) and not vars(parameter).get("single_expert", False)
    return parameter.ndim - int(stacked)


def gather_experts(tensor_local: Tensor, layer: MoELayer) -> Tensor:
    """The global (E, ...) tensor from every process' (L, ...) slice; a collective of the EP group.

    On a layer that is not expert-parallel the tensor is global already and comes back as it is.
    """
    if not isinstance(layer, SpreadMoE):
        return tensor_local
    group = groups._get_expert_parallel_group(layer.expert_group_name)
    tensor_local = tensor_local.contiguous()
    pieces = [torch.empty_like(tensor_local) for _ in range(layer.ep_size)]
    dist.all_gather(pieces, tensor_local, group=group)
    return torch.cat(pieces)


def slice_experts(tensor_global: Tensor, layer: MoELayer) -> Tensor:
    """A view of this process' slice (L, ...) of a global (E, ...) tensor; no communication."""
    if not isinstance(layer, SpreadMoE):
        return tensor_global
    return tensor_global[layer.first_expert : layer.first_expert + layer.num_local_experts]


@dataclass(frozen=True)
class LogicalTensor:
    """One tensor of the model and what this process holds of it.

    Attributes:
        name: its name in a model of one process.
        parts: what is held here: the tensor, the stack of this process' experts, or one tensor for
            each of them.
        owner: the layer whose experts it belongs to; None if every process holds the whole.
        single: whether the parts are single experts.
    """

    name: str
    parts: tuple[Tensor, ...]
    owner: MoELayer | None
    single: bool = False

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""
        own = self.join(self.parts).shape
        return own if self.owner is None else torch.Size([self.owner.num_experts, *own[1:]])

    def join(self, values: Sequence[Tensor]) -> Tensor:
        """The local stack (or the whole) from values shaped as the parts."""
        return torch.stack([value.t() for value in values]) if self.single else values[0]

    def split(self, local: Tensor) -> list[Tensor]:
        """Values shaped as the parts from the local stack (or the whole)."""
        return [piece.t().contiguous() for piece in local] if self.single else [local]

    def gather(self, values: Sequence[Tensor]) -> Tensor:
        """The logical tensor from values shaped as the parts. A collective where it is spread."""
        local = self.join(values)
        return local if self.owner is None else gather_experts(local, self.owner)

    def pick(self, whole: Tensor) -> Tensor:
        """What this process holds of a logical tensor, as one tensor."""
        return whole if self.owner is None else slice_experts(whole, self.owner)


@dataclass(frozen=True, kw_only=True)
class PlacedTensor(LogicalTensor):
    """A tensor of an expert that one process of each expert-parallel group holds whole.

    Attributes:
        full: its own shape; the part held here may be larger, see `SpreadPlaced`.
        group_name: DeepSpeed's name of the group.
        holder: who of the group holds it.
        device: of this process.
    """

    full: torch.Size
    group_name: str
    holder: int
    device: torch.device

    @property
    def shape(self) -> torch.Size:
        """The expert's own."""
        return self.full

    def split(self, local: Tensor) -> list[Tensor]:
        """Zeros stand behind the expert's own part."""
        return [enlarged(local, part.shape) for part in self.parts]

    def gather(self, values: Sequence[Tensor]) -> Tensor:
        """The holder's tensor on every process of the group. A collective."""
        group = groups._get_expert_parallel_group(self.group_name)
        whole = None
        if self.parts:
            whole = values[0][tuple(slice(0, size) for size in self.full)].contiguous()
        if dist.get_world_size(group) == 1:
            assert whole is not None
            return whole
        source = dist.get_global_rank(group, self.holder)
        kind = torch.tensor([DTYPES.index(whole.dtype) if whole is not None else 0])
        kind = kind.to(self.device)
        dist.broadcast(kind, source, group=group)
        if whole is None:
            whole = torch.empty(self.full, dtype=DTYPES[int(kind)], device=self.device)
        dist.broadcast(whole, source, group=group)
        return whole


def _placed(layer: SpreadPlaced, prefix: str, own: str, held: Tensor) -> Iterator[PlacedTensor]:
    """The logical tensors of all experts that stand where the one of `own` does."""
    name, _, rest = own.partition(".")
    slot = layer.local_names.index(name)
    for holder, expert in enumerate(layer.at_slot(slot)):
        yield PlacedTensor(
            name=f"{prefix}experts.{expert}.{rest}",
            parts=(held,) if expert == name else (),
            owner=None,
            full=layer.shapes[f"{expert}.{rest}"],
            group_name=layer.expert_group_name,
            holder=holder,
            device=held.device,
        )


def logical_tensors(model: nn.Module, held: Mapping[str, Tensor]) -> Iterator[LogicalTensor]:
    """The logical tensors that some of a model's own tensors make up, in the order of the model.

    Args:
        model: any model; one that is not spread holds every logical tensor itself.
        held: tensors by their own names, such as a state dict or the named parameters.
    """
    owners, renamed = _owners(model), _renamed(model)
    names: dict[str, list[str]] = {}
    placed = {
        f"{_dotted(prefix)}experts.": layer
        for prefix, layer in placed_layers(model).items()
        if isinstance(layer, SpreadPlaced)
    }
    apart = [own for own in held if own.startswith(tuple(placed))]
    for own in held:
        if own in apart:
            continue
        name = renamed.get(own, own)
        if name is not None:
            names.setdefault(name, []).append(own)
    for name, own_names in names.items():
        owner = owners.get(own_names[0])
        yield LogicalTensor(
            name=name,
            parts=tuple(held[own] for own in own_names),
            owner=owner,
            single=owner is not None and own_names[0] in renamed,
        )
    for own in apart:  # in one order on all ranks: their structure is the same
        start = next(start for start in placed if own.startswith(start))
        prefix = start.removesuffix("experts.")
        yield from _placed(placed[start], prefix, own.removeprefix(start), held[own])


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict under the model's own names, also when the model is itself a sparse layer."""
    return {key: entry.detach() for key, entry in model.state_dict(destination=_empty()).items()}


def _empty() -> OrderedDict[str, Any]:
    return OrderedDict()


def _owners(model: nn.Module) -> dict[str, MoELayer]:
    """Name of an expert parameter -> the layer that it belongs to."""
    layers = moe_layers(model)
    owners: dict[str, MoELayer] = {}
    placed = tuple(f"{_dotted(prefix)}experts." for prefix in placed_layers(model))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_expert_parameter(parameter) and not name.startswith(placed):
            found = [layer for prefix, layer in layers.items() if name.startswith(_dotted(prefix))]
            assert found, f"expert parameter {name} outside every MoE layer"
            owners[name] = found[0]
    return owners


def _renamed(model: nn.Module) -> dict[str, str | None]:
    """Own name -> logical name over the whole model."""
    return {
        _dotted(prefix) + own: None if name is None else _dotted(prefix) + name
        for prefix, layer in moe_layers(model).items()
        if isinstance(layer, SpreadMoE)
        for own, name in layer.logical_names().items()
    }


def _dotted(prefix: str) -> str:
    return f"{prefix}." if prefix else ""


def experts_apart(state: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's state with its stacks taken apart: one entry per expert, named as DeepSpeed does.

    Raises:
        AssertionError: another part has "expert" in its name; DeepSpeed would take it for one.
    """
    apart: dict[str, Any] = {}
    for name, value in state.items():
        if name.startswith("experts."):
            own = name.removeprefix("experts.")
            apart |= {f"{DEEPSPEED_EXPERTS}{i}.{own}": piece for i, piece in enumerate(value)}
        else:
            assert "expert" not in name, f"DeepSpeed takes {name!r} for an expert; rename it"
            apart[name] = value
    return apart


def experts_together(
    state: MutableMapping[str, Any], *, prefix: str, names: Sequence[str], count: int
) -> None:
    """Stack the entries that `experts_apart` made, in place; what is not there is left alone.

    Args:
        state: a state dict.
        prefix: of the layer, with its dot.
        names: the experts' own names of their tensors.
        count: L.
    """
    for own in names:
        keys = [f"{prefix}{DEEPSPEED_EXPERTS}{i}.{own}" for i in range(count)]
        if all(key in state for key in keys):
            state[f"{prefix}experts.{own}"] = torch.stack([state.pop(key) for key in keys])
