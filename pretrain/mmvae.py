"""The objective of the cell autoencoder: evidence bound, adversaries, critics, cycle.

Every loss is a sum over genes of each cell and a mean over the cells of all processes, so that no
weight depends on the batch size. (The source sums the reconstruction over the batch and averages
the divergence; `compatibility` does the same.)

N cells of this process, R where their experts are, S species, D latent width.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mm_moe.batch import Batch
from mm_moe.cells.adversary import Adversaries, reverse_gradient
from mm_moe.cells.annealing import KLAnnealer, reversal_weight
from mm_moe.cells.configuration import SPECIES
from mm_moe.cells.core import Posterior, wide
from mm_moe.cells.critic import LOSSES, OutputCritic
from mm_moe.cells.modeling import CellVAE
from mm_moe.cells.output import CellOutput
from mm_moe.cells.passes import Crossing, Passes
from mm_moe.cells.species import Generated
from mm_moe.errors import ConfigError
from mm_moe.moe.noise import normal_by_place
from mm_moe.registry import nearest
from mm_moe.training.carried import Carried
from mm_moe.training.collectives import mean_weight, num_ranks, sum_over_ranks
from mm_moe.training.discriminator import Discriminator, Discriminators
from mm_moe.training.own_objective import StatefulObjective
from pretrain.cell_anchors import SAME_NAME, AnchorPlay, anchor_places
from pretrain.cell_critics import CriticPlay
from pretrain.cell_scores import CellScores

BALANCES = ("none", "genes")
REAL = ("cells", "cis")
Z = "z"  # the last layer of the adversaries
ANCHOR_SEED = 7919  # its map starts from other draws than the discriminators


@dataclass
class CellObjective(CellScores, StatefulObjective):
    """What a `CellVAE` is trained by.

    Attributes:
        problem_type: of the data set; not used.
        kl_low: weight of the KL divergence at the start.
        kl_high: in the end.
        kl_warmup: steps at `kl_low`.
        kl_climb: steps from `kl_low` to `kl_high`; 0 jumps.
        free_bits: nats of each latent dimension of a cell that cost nothing.
        balance: "genes" weighs a species' reconstruction by mean gene count / its own gene count,
            so that a longer gene list says no more; "none" leaves them.
        compatibility: multiply the reconstruction by the number of cells, as the source does.
        adversary_weight: of the reversed classifiers; 0: there are none.
        adversary_columns: what they read; None: the species and all conditions.
        adversary_hidden: widths of their trunks.
        adversary_steps: steps of theirs for each of the model.
        adversary_learning_rate: of their Adam.
        adversary_ramp: steps over which the reversal grows from 0 to 1; 0: at once.
        critic_weight: of fooling the critics of outputs; 0: there are none.
        critic_real: what counts as real. "cells": real cells, against all that is generated.
            "cis": what a decoder makes of its own species' cells, against what it makes of others';
            a decoder says expected values, which are smooth where single cells are sparse, so
            that a critic of cells has an easy task that no generator can spoil.
        critic_hidden: their widths.
        critic_loss: "logits" or "hinge".
        critic_steps: steps of theirs for each of the model.
        critic_learning_rate: of their Adam.
        critic_auc: a critic rests while its area under the ROC curve in the batch is above this.
        cycle_weight: of cells that come back from another species.
        latent_cycle_weight: of the distance (L1) between the means of a cell and of its
            translation.
        anchor_weight: of what the latent does not say of the anchors; 0: there are none.
        anchors: genes that mean the same in all species (see `pretrain.cell_anchors`): "same_name",
            or species -> names.
        anchor_steps: steps of the map from the latent to them for each of the model.
        anchor_learning_rate: of its Adam.
        seed: of the draws and of new discriminators.

    Raises:
        ConfigError: a number out of range, or an unknown kind.
    """

    uses_labels: ClassVar[bool] = False
    model_type: ClassVar[str] = "mm_moe_cell_vae"

    problem_type: str = "none"
    kl_low: float = 1.0
    kl_high: float = 1.0
    kl_warmup: int = 0
    kl_climb: int = 0
    free_bits: float = 0.0
    balance: str = "none"
    compatibility: bool = False
    adversary_weight: float = 0.0
    adversary_columns: list[str] | None = None
    adversary_hidden: list[int] = field(default_factory=lambda: [128, 64])
    adversary_steps: int = 1
    adversary_learning_rate: float = 1e-3
    adversary_ramp: int = 1000
    critic_weight: float = 0.0
    critic_real: str = "cells"
    critic_hidden: list[int] = field(default_factory=lambda: [256, 64])
    critic_loss: str = "logits"
    critic_steps: int = 1
    critic_learning_rate: float = 1e-4
    critic_auc: float = 1.0
    cycle_weight: float = 0.0
    latent_cycle_weight: float = 0.0
    anchor_weight: float = 0.0
    anchors: Any = SAME_NAME
    anchor_steps: int = 4
    anchor_learning_rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        kinds = (("balance", BALANCES), ("critic_loss", LOSSES), ("critic_real", REAL))
        for name, known in kinds:
            value = getattr(self, name)
            if value not in known:
                hint = nearest(str(value), list(known))
                raise ConfigError(f"unknown objective_config.{name} {value!r}; {hint}")
        for name in (
            *("free_bits", "adversary_weight", "adversary_steps", "adversary_learning_rate"),
            *("adversary_ramp", "critic_weight", "critic_steps", "critic_learning_rate"),
            *("critic_auc", "cycle_weight", "latent_cycle_weight"),
            *("anchor_weight", "anchor_steps", "anchor_learning_rate"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise ConfigError(f"objective_config.{name} ({value!r}) must be a number from 0.")
        self.annealer = KLAnnealer(
            low=self.kl_low, high=self.kl_high, warmup=self.kl_warmup, climb=self.kl_climb
        )
        self.adversary: Discriminator | None = None
        self.critics: CriticPlay | None = None
        self.anchor: AnchorPlay | None = None
        self._gene_weights: list[float] = []

    def prepare(self, model: nn.Module, *, device: torch.device, seed: int) -> None:
        """Make the discriminators.

        Raises:
            ConfigError: no `CellVAE`, an unknown column, or nothing to translate to.
        """
        if not isinstance(model, CellVAE):
            raise ConfigError("the objective mmvae trains a cell autoencoder (CellVAE) only.")
        config, seed = model.config, seed + self.seed
        counts = [len(config.genes[name]) for name in model.modalities]
        mean = sum(counts) / len(counts)
        self._gene_weights = [
            mean / len(config.genes[name]) if self.balance == "genes" else 1.0
            for name in model.species.local_names
        ]
        crosses = self.critic_weight or self.cycle_weight or self.latent_cycle_weight
        if crosses and len(counts) < 2:
            raise ConfigError(
                "critic_weight, cycle_weight and latent_cycle_weight translate between species, "
                f"and the data have {model.modalities[0]!r} alone; leave them out."
            )
        dtype = wide(next(model.core.parameters())).dtype
        if self.adversary_weight:
            module = _seeded(seed, lambda: self._new_adversaries(model)).to(device, dtype)
            if module.heads:
                self.adversary = Discriminator(
                    module, learning_rate=self.adversary_learning_rate, sum_over=sum_over_ranks
                )
        if self.critic_weight:
            self.critics = CriticPlay(
                {
                    name: self._new_critic(name, model, seed).to(device, dtype)
                    for name in model.species.local_names
                },
                placement=model.species.placement,
                cells_are_real=self.critic_real == "cells",
                kind=self.critic_loss,
                steps=self.critic_steps,
                learning_rate=self.critic_learning_rate,
                most_auc=self.critic_auc,
            )
        if self.anchor_weight:
            places = anchor_places(self.anchors, model.config.genes)
            self.anchor = _seeded(seed + ANCHOR_SEED, lambda: self._new_anchor(model, places))
            self.anchor.held.module.to(device, dtype)

    def _new_anchor(self, model: CellVAE, places: Mapping[str, list[int]]) -> AnchorPlay:
        return AnchorPlay(
            places,
            latent_size=model.config.latent_size,
            learning_rate=self.anchor_learning_rate,
            steps=self.anchor_steps,
        )

    def _new_adversaries(self, model: CellVAE) -> Adversaries:
        known = [SPECIES, *model.config.columns]
        columns = known if self.adversary_columns is None else self.adversary_columns
        for name in columns:
            if name not in known:
                hint = nearest(name, known)
                raise ConfigError(f"unknown column {name!r} in adversary_columns; {hint}")
        widths = {f"hidden_{i}": width for i, width in enumerate(model.config.core_hidden)}
        words = model.conditioner.vocabularies
        return Adversaries(
            {**widths, Z: model.config.latent_size},
            hidden=self.adversary_hidden,
            heads={name: words[name].num_labels for name in columns},
        )

    def _new_critic(self, species: str, model: CellVAE, seed: int) -> OutputCritic:
        """Its start depends on the species and not on who holds it."""
        genes = len(model.config.genes[species])
        own = seed + zlib.crc32(species.encode())
        return _seeded(own, lambda: OutputCritic(genes, hidden=self.critic_hidden))

    def carried(self) -> dict[str, Carried]:
        """The annealed weight, and the discriminators with their moments."""
        found: dict[str, Carried] = {"kl_weight": self.annealer}
        if self.adversary is not None:
            found["adversary"] = self.adversary
        if self.critics is not None:
            found["critics"] = Discriminators(self.critics.held)
        if self.anchor is not None:
            found["anchors"] = self.anchor.held
        return found

    def callbacks(self) -> list[TrainerCallback]:
        """The weights go on with each step."""
        return [_Steps(self.annealer)]

    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Any]:
        """Return (loss, its parts and other figures for the log, the model's output)."""
        figures: dict[str, Tensor] = {}
        output = model(**batch, run=functools.partial(self.run, batch=batch, figures=figures))
        loss = torch.stack(list(output.losses.values())).sum()
        return loss, {**output.losses, **figures}, output

    def run(
        self, passes: Passes, *, batch: Mapping[str, Any], figures: dict[str, Tensor]
    ) -> CellOutput:
        """All passes of a step; the discriminators take theirs before the model's loss is made."""
        cells = passes.cells
        posterior = passes.posterior()
        count = torch.tensor(len(cells), device=posterior.mu.device)
        weight = mean_weight(count, dtype=posterior.mu.dtype)
        z = posterior.sample(self._noise(batch["ids"], passes, "z"))
        generated = passes.generate(z)
        kl = posterior.kl(free_bits=self.free_bits).sum() * weight
        losses = {
            "reconstruction": self._error(passes, generated, weight),
            "kl": self.annealer.weight * kl,
        }
        figures["kl_nats"] = kl
        if self.adversary is not None:
            hidden = {**posterior.hidden, Z: z}
            losses["adversary"] = self._play(self.adversary, passes, hidden, figures)
        if self.anchor is not None:
            unsaid, figures["anchors_unexplained"] = self.anchor.play(passes, posterior.mu)
            losses["anchors"] = self.anchor_weight * unsaid
        if self.critic_weight or self.cycle_weight or self.latent_cycle_weight:
            shift = 1 + self.annealer.steps % (len(passes.modalities) - 1)
            crossing = passes.cross(z, shift=shift)
            losses |= self._crossed(passes, posterior, crossing, batch["ids"], weight)
            if self.critics is not None:
                fooled, auc = self.critics.play(passes, generated, crossing)
                losses["critic"] = self.critic_weight * fooled * weight
                figures["critic_auc"] = auc
        return CellOutput(
            mu=posterior.mu,
            logvar=posterior.logvar,
            hidden=posterior.hidden,
            losses=losses,
            routing={},
        )

    def _error(self, passes: Passes, generated: list[Generated], weight: Tensor) -> Tensor:
        """The share of the reconstruction that arises here: at the experts, not at home."""
        total = weight.new_zeros(())
        for errors_R, own in zip(passes.errors(generated), self._gene_weights, strict=True):
            total = total + own * errors_R.sum()
        # the mean over ranks gives the sum over all cells
        return total * (num_ranks() if self.compatibility else weight)

    def _crossed(
        self,
        passes: Passes,
        posterior: Posterior,
        crossing: Crossing,
        ids: list[str],
        weight: Tensor,
    ) -> dict[str, Tensor]:
        """Losses of cells that were read again in another species."""
        if not (self.cycle_weight or self.latent_cycle_weight):
            return {}
        there = passes.posterior_of(crossing)
        losses = {}
        if self.latent_cycle_weight:
            far = (there.mu - posterior.mu).abs().sum() * weight
            losses["latent_cycle"] = self.latent_cycle_weight * far
        if self.cycle_weight:
            again = passes.generate(there.sample(self._noise(ids, passes, "cycle")))
            losses["cycle"] = self.cycle_weight * self._error(passes, again, weight)
        return losses

    def _play(
        self,
        adversary: Discriminator,
        passes: Passes,
        hidden: Mapping[str, Tensor],
        figures: dict[str, Tensor],
    ) -> Tensor:
        """Train the classifiers on detached values, then what the model gets of them, reversed."""
        module: Any = adversary.module
        cells, conditioner = passes.cells, passes.conditioner
        classes = {
            name: conditioner.classes(name, cells.conditions, cells.species_N)
            for name in module.heads
        }
        hidden = {name: wide(values) for name, values in hidden.items()}
        dtype = hidden[Z].dtype
        weights = mean_weight(module.counts(classes), dtype=dtype)
        fixed = {name: values.detach() for name, values in hidden.items()}
        for _ in range(self.adversary_steps):
            adversary.step(lambda: module(fixed, classes, weights / num_ranks())[0])
        ramp = self.annealer.steps / self.adversary_ramp if self.adversary_ramp else 1.0
        turned = {
            name: reverse_gradient(values, reversal_weight(ramp)) for name, values in hidden.items()
        }
        loss, right = module(turned, classes, weights)
        figures |= {f"adversary_accuracy_{name}": share for name, share in right.items()}
        return self.adversary_weight * loss

    def _noise(self, ids: list[str], passes: Passes, purpose: str) -> Tensor:
        """Standard normal draws (N, D) that belong to a cell and a step, not to a process."""
        key = f"{self.seed}/{self.annealer.steps}/{purpose}"
        rows = passes.cells.rows_N.tolist()
        places = torch.tensor([_number(ids[row]) for row in rows], dtype=torch.int64)
        device = passes.cells.rows_N.device
        return normal_by_place(_number(key) >> 1, places.to(device), passes.config.latent_size)


class _Steps(TrainerCallback):
    def __init__(self, annealer: KLAnnealer) -> None:
        self.annealer = annealer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step for the weights."""
        self.annealer.step()


def _number(text: str) -> int:
    """A hash of a text that fits into int64 with room for a factor of thousands."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"cell noise").digest()
    return int.from_bytes(digest, "big") >> 16


def _seeded(seed: int, make: Any) -> Any:
    """A module whose start depends on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
