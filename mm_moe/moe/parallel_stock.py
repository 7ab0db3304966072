"""DeepSpeed's own sparse layer behind the interface of ours, for comparison.

`deepspeed.moe.layer.MoE` (0.19.8) does the gating, the exchange and the experts. Around it: padding
never reaches it (real tokens are packed first), a batch on which it would abort or hang is refused
on every rank before its first collective, and its weights have the names and shapes of our layer in
a checkpoint, so that a model trained with it is published as one of ours.

What differs from our layer, and stays so: its balance loss is the mean of the ranks' own losses
(with 2 choices over the first ones only), its gate computes in float32 even for float64, and with a
capacity each rank drops its own rows, at top_k 1 and 2 the last ones.

T real tokens of this rank, D width, E experts, K choices per token, P processes.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import _capacity
from torch import Tensor, nn

from mm_moe.errors import ParallelismError
from mm_moe.moe.balance import RoutingSums, router_z
from mm_moe.moe.companion import FeedForward
from mm_moe.moe.context import TokenContext
from mm_moe.moe.layer import MoELayer, RoutingRecord
from mm_moe.moe.parallel_state import SpreadMoE
from mm_moe.moe.router import Routing
from mm_moe.moe.settings import MoESettings

_WAY_OUT = "or take --moe_backend ours"
_ANY_VALUE = {  # settings that the stock layer follows, or that the router does not read
    *("num_experts", "top_k", "load_balance_coef", "drop_tokens", "capacity_factor"),
    *("eval_capacity_factor", "min_capacity", "use_residual", "num_shared_experts", "noise_std"),
    *("jitter_eps", "slots_per_expert", "num_modalities", "num_interactions"),
    *("global_entropy_threshold", "modalities", "num_shared_candidates"),
}
_EXPERT_PARTS = {
    "fc1.weight": "w_in",
    "fc1.bias": "b_in",
    "fc2.weight": "w_out",
    "fc2.bias": "b_out",
}


def check_stock(settings: MoESettings) -> None:
    """Refuse settings that DeepSpeed's layer does not have.

    Raises:
        ParallelismError: names each of them, its value and a way out.
    """
    problems = []
    if settings.router != "topk_softmax":
        problems.append(f"router {settings.router!r} (it has topk_softmax)")
    if settings.router_z_coef:
        problems.append(f"router z-loss, here {settings.router_z_coef:g} (set it to 0)")
    if settings.renormalise and settings.top_k == 1:
        problems.append(
            "weights that sum to 1 at top_k 1 (it multiplies by the raw probability; say so with "
            """--moe_config '{"renormalise": false}')"""
        )
    if not settings.renormalise and settings.top_k > 1:
        problems.append(f"raw probabilities at top_k {settings.top_k} (leave renormalise out)")
    known = {*_ANY_VALUE, "router", "router_z_coef", "renormalise"}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name not in known and value != field.default:
            problems.append(f"{field.name} {value!r} (leave it out)")
    if problems:
        raise ParallelismError(
            f"--moe_backend deepspeed: DeepSpeed's layer has no {'; no '.join(problems)}; "
            f"change that, {_WAY_OUT}."
        )


def stock_warning(settings: MoESettings, *, ep_size: int) -> str | None:
    """What a run on DeepSpeed's layer may be stopped by, or None where it runs on any batch."""
    reasons = []
    if settings.drop_tokens and ep_size > 1:
        reasons.append("processes need equal numbers of tokens (a capacity is set)")
    if settings.drop_tokens and settings.top_k == 1:
        reasons.append(f"each process needs at least min_capacity ({settings.min_capacity}) tokens")
    if not settings.drop_tokens and settings.top_k == 1 and ep_size > 1:
        reasons.append("no expert may get more rows of one process than another process has tokens")
    if not reasons:
        return None
    return (
        f"--moe_backend deepspeed: {' and '.join(reasons)}. With missing modalities that is only "
        f"known batch by batch; the run stops with a message at the first batch that breaks it. "
        f"--top_k_experts 2 without a capacity has no such batch, {_WAY_OUT}."
    )


def stock_capacity(settings: MoESettings, *, num_tokens: int, training: bool) -> int:
    """Rows of one process that DeepSpeed's layer gives an expert room for, when it may drop."""
    factor = settings.capacity_factor if training else settings.eval_capacity_factor
    gates = torch.empty(num_tokens, settings.num_experts, device="meta")  # only its shape is read
    factors = torch.tensor(factor * settings.top_k), torch.tensor(settings.min_capacity)
    return int(_capacity(gates, *factors))


def refused_counts(
    counts_P2: list[list[int]], *, settings: MoESettings, ep_size: int, training: bool
) -> str | None:
    """Why DeepSpeed's layer cannot run a batch, or None if it can.

    Args:
        counts_P2: of each process, its tokens and the rows that its fullest expert gets.
        settings: of the layer.
        ep_size: consecutive processes that share the experts.
        training: which capacity factor holds.
    """
    for first in range(0, len(counts_P2), ep_size):
        group = counts_P2[first : first + ep_size]
        tokens = [count for count, _ in group]
        said = f"processes {first} to {first + ep_size - 1} have {_listed(tokens)} tokens"
        if ep_size == 1:
            said = f"process {first} has {tokens[0]} tokens"
        if settings.drop_tokens and settings.top_k == 1 and min(tokens) < settings.min_capacity:
            return (
                f"{said}, and at top_k 1 each needs at least min_capacity ({settings.min_capacity})"
            )
        if ep_size == 1:
            continue
        if settings.drop_tokens:
            rooms = [
                stock_capacity(settings, num_tokens=count, training=training) for count in tokens
            ]
            if len(set(rooms)) > 1:
                return f"{said}, which gives its buffers different capacities, {_listed(rooms)}"
        elif settings.top_k == 1 and max(fullest for _, fullest in group) > min(tokens):
            rows = [fullest for _, fullest in group]
            return (
                f"{said}, and their fullest experts get {_listed(rows)} rows: at top_k 1 no expert "
                "may get more rows of one process than another has tokens"
            )
    return None


def _listed(numbers: list[int]) -> str:
    shown = [str(number) for number in numbers[:16]]
    return ", ".join(shown + (["..."] if len(numbers) > len(shown) else []))


class StockMoE(SpreadMoE):
    """A sparse layer whose work is done by `deepspeed.moe.layer.MoE`, in the child `stock`.

    The router's weight is the gate's weight, one parameter under two names. A dense companion
    (residual or shared expert) is ours. The random second choice and the random choice of dropped
    rows that the stock layer has by default are off, so that evaluation repeats.

    Args:
        layer: the whole layer, identical on every process.
        ep_size: processes that share the experts; `check_layout` has accepted it.

    Raises:
        ParallelismError: settings that DeepSpeed's layer does not have.
    """

    def __init__(self, layer: MoELayer, *, ep_size: int) -> None:
        nn.Module.__init__(self)
        check_stock(layer.settings)
        self._take_part(layer, ep_size=ep_size)
        self.router, self.companion = layer.router, layer.companion
        self.stock = _stock_layer(layer, ep_size=ep_size)
        self.stock.deepspeed_moe.gate.wg.weight = layer.router.weight
        for own, name in _EXPERT_PARTS.items():
            whole = layer.experts.get_parameter(name)
            for i, expert in enumerate(self._local_experts()):
                parameter = expert.get_parameter(own)
                parameter.data = whole.detach()[self.first_expert + i].t().contiguous()
                parameter.requires_grad_(whole.requires_grad)
                vars(parameter)["single_expert"] = True
        self.train(layer.training)

    @property
    def experts(self) -> nn.Module:  # type: ignore[override]  # not one stack
        """This process' experts."""
        return self.stock.deepspeed_moe.experts

    def _local_experts(self) -> nn.ModuleList:
        return self.stock.deepspeed_moe.experts.deepspeed_experts

    def logical_names(self) -> dict[str, str | None]:
        """Each expert's parts belong to our layer's stacks; the gate's weight is the router's."""
        names: dict[str, str | None] = {"stock.deepspeed_moe.gate.wg.weight": None}
        for i, (own, name) in itertools.product(
            range(self.num_local_experts), _EXPERT_PARTS.items()
        ):
            own = f"stock.deepspeed_moe.experts.deepspeed_experts.{i}.{own}"
            names[own] = f"experts.{name}"
        return names

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by DeepSpeed's engine, before it gives the child the process groups.

        The child refuses to get them twice, so those of an earlier pass are forgotten.
        """
        super().set_deepspeed_parallelism(use_data_before_expert_parallel_)
        self.stock.deepspeed_moe.ep_group = self.stock.deepspeed_moe.gate.ep_group = None

    def forward(
        self, x: Tensor, mask: Tensor | None = None, context: TokenContext | None = None
    ) -> tuple[Tensor, RoutingRecord]:
        """As `MoELayer.forward`.

        Raises:
            ParallelismError: DeepSpeed's layer would abort or hang on the tokens of the processes;
                raised on every process, with the numbers.
        """
        flat_TD = x.reshape(-1, x.shape[-1])
        real_T = None if mask is None else mask.reshape(-1).nonzero().squeeze(1)
        x_TD = flat_TD if real_T is None else flat_TD.index_select(0, real_T)
        with torch.no_grad():  # in float32, as the gate does it
            routing = self.router(
                x_TD.float(), (context or TokenContext()).at(x.shape[:-1], real_T)
            )
        self._refuse_counts(routing)
        y_TD, balance, tokens_E = self._run(x_TD)
        if self.companion is not None:
            y_TD = self.companion.join(x_TD, y_TD)
        if real_T is not None:
            y_TD = y_TD.new_zeros(flat_TD.shape).index_copy(0, real_T, y_TD)
        return y_TD.view(x.shape), self._stock_record(routing, tokens_E, balance)

    def _run(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output, balance loss of this rank, and the rows that each expert took."""
        if self.stock.deepspeed_moe.ep_group is None:  # no engine has been there yet
            self.stock.set_deepspeed_parallelism()
        y_TD, balance, tokens_E = self.stock(x_TD)
        if not len(x_TD):
            balance = y_TD.new_zeros(())  # the stock layer's is the mean over nothing, NaN
        if self.settings.drop_tokens:
            tokens_E = tokens_E.clamp(
                max=stock_capacity(self.settings, num_tokens=len(x_TD), training=self.training)
            )
        return y_TD, balance, tokens_E

    def _refuse_counts(self, routing: Routing) -> None:
        """Compare the ranks' counts; every rank sees all of them and comes to the same end."""
        best_T = routing.prob_TE.argmax(-1)  # all that top_k 1 takes, the only one to look at it
        fullest = torch.bincount(best_T, minlength=self.num_experts).max()
        mine_2 = torch.stack([fullest.new_tensor(len(best_T)), fullest])
        counts = [torch.empty_like(mine_2) for _ in range(dist.get_world_size())]
        dist.all_gather(counts, mine_2)
        reason = refused_counts(
            torch.stack(counts).tolist(),
            settings=self.settings,
            ep_size=self.ep_size,
            training=self.training,
        )
        if reason is not None:
            raise ParallelismError(
                f"DeepSpeed's layer cannot run this batch: {reason}. Take --top_k_experts 2 "
                f"without a capacity, or --ep_size 1, {_WAY_OUT}."
            )

    def _stock_record(self, routing: Routing, tokens_E: Tensor, balance: Tensor) -> RoutingRecord:
        sums = RoutingSums.of(
            logit_TE=routing.logit_TE,
            prob_TE=routing.prob_TE,
            expert_TK=routing.expert_TK,
            dropped=routing.expert_TK.numel() - tokens_E.sum(),
            sum_over_ranks=_sum_over_ranks,
        )
        tokens = sums.tokens.clamp(min=1)
        metrics = {
            "router_entropy": sums.entropy / tokens,
            "router_z": router_z(sums),
            "dropped": sums.dropped / sums.routed_E.sum().clamp(min=1),
            "tokens": sums.tokens,
        }
        losses = {"load_balance": self.settings.load_balance_coef * balance}
        return RoutingRecord(tokens_E, losses, metrics, sums.routed_E.round().long())


def _sum_over_ranks(totals: Tensor) -> Tensor:
    dist.all_reduce(totals)
    return totals


def _stock_layer(layer: MoELayer, *, ep_size: int) -> MoE:
    """DeepSpeed's layer in the shape, type and place of ours; its own weights mean nothing yet."""
    settings, model = layer.settings, layer.experts
    with torch.random.fork_rng(devices=[]):  # later draws are those of a run on our layer
        expert = FeedForward(
            width=layer.width, hidden=model.w_out.shape[1], activation=model.activation
        )
        stock = MoE(
            layer.width,
            expert,
            num_experts=layer.num_experts,
            ep_size=ep_size,
            k=settings.top_k,
            capacity_factor=settings.capacity_factor,
            eval_capacity_factor=settings.eval_capacity_factor,
            # without a capacity it is of no use, and at top_k 1 fewer tokens would be an error
            min_capacity=settings.min_capacity if settings.drop_tokens else 0,
            drop_tokens=settings.drop_tokens,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
    return stock.to(model.w_in.device, model.w_in.dtype)
