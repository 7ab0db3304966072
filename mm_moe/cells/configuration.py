"""What a cell autoencoder is made of, as the `config.json` of a folder."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from mm_moe.errors import ConfigError
from mm_moe.registry import nearest

FROM_DATA = ("modalities", "genes", "conditions")  # never an option of a run
SPECIES = "species"  # the column that every model has
CONDITIONERS = ("none", "sequential", "concat", "film")
LIKELIHOODS = ("mse", "nb", "zinb")
NORMS = ("layer", "batch", "none")


@strict
class CellVAEConfig(PreTrainedConfig):
    """Sizes, vocabularies and kinds of one model.

    Attributes:
        modalities: the species, in their fixed order.
        genes: species -> names of its genes, in the order of the counts.
        conditions: column -> its labels, shared by the species; or species -> labels, where a
            species has its own. Code 0 is an unknown label, code i + 1 label i.
        condition_order: the columns in the order in which the conditioner applies them; the column
            "species" needs no labels. None: species, then those of `conditions`.
        conditioner: "none", "sequential" (one linear map per label, one column after the other),
            "concat" (all columns on the same z, side by side) or "film" (a scale and a shift per
            label, one column after the other).
        condition_rank: 0 for full maps of "sequential" and "concat", else the rank of each label's
            deviation from the identity: for columns of thousands of labels.
        kept_columns: columns whose labels go along when a cell is translated to another species;
            all others become unknown, unless the caller names a label.
        expert_hidden: widths between the genes and `expert_width`, mirrored in the decoder.
        expert_width: of what an expert hands to the core.
        core_hidden: widths between `expert_width` and the latent, mirrored in the decoder.
        latent_size: of z.
        expert_norm: "layer", "batch" or "none", in encoders. The specification has batch norm;
            layer norm says the same of a cell whatever it is batched with.
        core_norm: likewise.
        dropout: behind every hidden layer of the expert encoders.
        likelihood: "mse" (squared error of log-normalised values), "nb" (negative binomial counts)
            or "zinb" (zero-inflated).
    """

    model_type = "mm_moe_cell_vae"

    modalities: list[str] | tuple[str, ...] = ()
    genes: dict[str, list[str]] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)
    condition_order: list[str] | None = None
    conditioner: str = "film"
    condition_rank: int = 0
    kept_columns: list[str] = field(default_factory=list)
    expert_hidden: list[int] = field(default_factory=lambda: [1024])
    expert_width: int = 512
    core_hidden: list[int] = field(default_factory=lambda: [256])
    latent_size: int = 128
    expert_norm: str = "layer"
    core_norm: str = "layer"
    dropout: float = 0.1
    likelihood: str = "nb"

    def __post_init__(self, **kwargs: Any) -> None:
        """Check names and numbers.

        Raises:
            ConfigError: an unknown kind or column, or a number out of range.
        """
        self.modalities = list(self.modalities)
        super().__post_init__(**kwargs)
        for what, known in (
            ("conditioner", CONDITIONERS),
            ("likelihood", LIKELIHOODS),
            ("expert_norm", NORMS),
            ("core_norm", NORMS),
        ):
            value = getattr(self, what)
            if value not in known:
                raise ConfigError(f"unknown {what} {value!r}; {nearest(value, list(known))}")
        self._check_numbers()
        if self.modalities:  # the library makes an empty one, too
            self._check_columns()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of `conditions`, in the order of the codes of a batch."""
        return tuple(self.conditions)

    @property
    def applied(self) -> tuple[str, ...]:
        """The columns of the conditioner, in its order."""
        if self.conditioner == "none":
            return ()
        if self.condition_order is not None:
            return tuple(self.condition_order)
        return (SPECIES, *self.columns)

    def labels(self, column: str) -> dict[str, list[str]]:
        """Species -> labels of a column; under "" where all species share them."""
        if column == SPECIES:
            return {"": list(self.modalities)}
        found = self.conditions[column]
        return dict(found) if isinstance(found, dict) else {"": list(found)}

    def _check_numbers(self) -> None:
        widths = [*self.expert_hidden, self.expert_width, *self.core_hidden, self.latent_size]
        if not self.expert_hidden or min(widths) < 1 or self.condition_rank < 0:
            raise ConfigError(
                f"widths ({', '.join(map(str, widths))}) must be at least 1, expert_hidden needs "
                f"one, and condition_rank ({self.condition_rank}) must be at least 0."
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout ({self.dropout}) must lie in [0, 1).")

    def _check_columns(self) -> None:
        for name in self.modalities:
            if not self.genes.get(name):
                raise ConfigError(f"species {name!r} has no genes; the model needs their names.")
        if SPECIES in self.conditions:
            raise ConfigError(f"the column {SPECIES!r} is known already; leave it out.")
        for column in (*self.applied, *self.kept_columns):
            if column != SPECIES and column not in self.conditions:
                known = [SPECIES, *self.columns]
                raise ConfigError(f"unknown column {column!r}; {nearest(column, known)}")
        for column in self.columns:
            lost = [name for name in self.labels(column) if name not in ("", *self.modalities)]
            if lost:
                raise ConfigError(
                    f"column {column!r} has labels of {lost[0]!r}, which is no species of the "
                    f"model ({', '.join(self.modalities)})."
                )
