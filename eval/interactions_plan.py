"""The trainings behind fused interaction experts: which, from where, and with what flags.

For each seed: a baseline; one expert per category, a copy of it that goes on from its weights; a
fuser; and, as the control, baselines of other seeds until there are as many models as the fused
answer has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.grid_plan import Cell, Method, digest, method_digest
from mm_moe.errors import ConfigError

BASELINE, FUSER, EXPERT = "baseline", "fuser", "expert_"
FURTHER = 1000  # member m of seed s's ensemble has seed s + 1000 m
# Flags of launch/train.py that the driver sets by itself.
OWN_FLAGS = ("interaction_table", "interaction_subset", "reject_class", "interaction_target")
Cells = dict[Cell, str]


@dataclass(frozen=True)
class Plan:
    """What is trained.

    Attributes:
        table: of the categories.
        categories: one expert for each.
        seeds: of baselines, experts and fusers.
        train: missing pattern of all trainings.
        reject: whether experts see all rows, with a class more.
        num_members: models in the ensemble of baselines, the baseline of the seed among them.
        expert_words: flags of the experts alone.
        fuser_words: flags of the fuser alone.
    """

    table: Path
    categories: tuple[str, ...]
    seeds: tuple[int, ...]
    train: str
    reject: bool
    num_members: int
    expert_words: tuple[str, ...] = ()
    fuser_words: tuple[str, ...] = ()

    def baseline(self, seed: int) -> Cell:
        """The model of the whole training split."""
        return Cell(Method(BASELINE, ()), self.train, seed)

    def members(self, seed: int) -> list[Cell]:
        """The ensemble of a seed: its baseline, and those of seeds that no other ensemble has."""
        return [self.baseline(seed + FURTHER * m) for m in range(self.num_members)]

    def expert(self, category: str, seed: int, *, start: Path | None) -> Cell:
        """The expert of a category, which goes on from a baseline's folder.

        Args:
            category: of its rows.
            seed: of its baseline, too.
            start: the baseline's published folder; None: to check the flags before it is there.
        """
        words = [*self._table_words, "--interaction_subset", category]
        words += ["--reject_class", "true"] if self.reject else []
        if start is not None:  # the backbone's settings are those of the baseline's folder
            words += ["--pretrained", str(start), "--keep_head", "true", "--backbone_config", "{}"]
        return Cell(Method(EXPERT + category, (*words, *self.expert_words)), self.train, seed)

    def fuser(self, seed: int) -> Cell:
        """The model whose classes are the categories; it starts where the baseline started."""
        words = (*self._table_words, "--interaction_target", "true", *self.fuser_words)
        return Cell(Method(FUSER, words), self.train, seed)

    @property
    def _table_words(self) -> list[str]:
        return ["--interaction_table", str(self.table)]

    @property
    def kinds(self) -> list[Cell]:
        """One cell of each kind, for the check of the flags."""
        seed = self.seeds[0]
        experts = [self.expert(name, seed, start=None) for name in self.categories]
        return [self.baseline(seed), *experts, self.fuser(seed)]

    def table_digest(self) -> str:
        """sha256 of the table, on whose content, not place, experts and fuser depend."""
        return hashlib.sha256(self.table.read_bytes()).hexdigest()


def check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """The seeds, each once and below the further ones.

    Raises:
        ConfigError: one is out of range, or there twice.
    """
    for seed in seeds:
        if not 0 <= seed < FURTHER or list(seeds).count(seed) > 1:
            raise ConfigError(
                f"seed {seed} must lie from 0 to {FURTHER - 1}, and stand there once; the "
                f"ensembles take those from {FURTHER} on."
            )
    return tuple(seeds)


def refuse_own_flags(words: Sequence[str], *, where: str) -> None:
    """Refuse flags that say what each training is.

    Raises:
        ConfigError: names the flag.
    """
    for word in words:
        name = word[2:].split("=")[0].replace("-", "_") if word.startswith("--") else ""
        if name in (*OWN_FLAGS, "keep_head"):
            raise ConfigError(
                f"{where}: eval.interactions sets --{name} for each training; give its own "
                "--interaction_table and --reject_class instead."
            )


def digests(plan: Plan, cells: Sequence[Cell], runs: Mapping[str, Any], *, test_seed: int) -> Cells:
    """Each cell with a hash of everything that its numbers depend on.

    Args:
        plan: what is trained.
        cells: of one stage.
        runs: name of a method -> its settings and data (see `launch/check_runs.py`).
        test_seed: of the test mask.
    """
    found = {}
    for cell in cells:
        names = [cell.method.name]
        if cell.method.name.startswith(EXPERT):
            names.append(BASELINE)  # it starts from what the baseline became
        parts = [_without_place(runs[name]) for name in names]
        if cell.method.name != BASELINE:
            parts.append(plan.table_digest())
        found[cell] = cell.digest(digest(parts), test_seed=test_seed)
    return found


def _without_place(run: Mapping[str, Any]) -> str:
    """Hash of a training's settings; the table counts by its content, not by its path."""
    return method_digest({**run, "arguments": {**run["arguments"], "interaction_table": None}})
