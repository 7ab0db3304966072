"""Made data with a dial for redundancy, uniqueness and synergy, and the truth of every sample.

Two modalities, `first` and `second`, are vectors; the label has two classes. What a sample is, and
what its modalities say of it, is drawn from a seed, so nothing is stored and any size will do.

N samples, D width of a modality, Q mechanisms.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import datasets
import numpy as np

from mm_moe.batch import Sample
from mm_moe.data.schema import SINGLE_LABEL, DataSource
from mm_moe.errors import ConfigError
from mm_moe.registry import nearest

FIRST, SECOND = "first", "second"
MECHANISMS = ("R", "U_first", "U_second", "AS", "xor")  # how the label follows from the two bits
SUMMANDS = ("first", "second", "xor")  # of the logit
SPLITS = ("train", "validation", "test")
CUES = 8  # directions that say the mechanism, in each modality
FLOAT = np.dtype("<f4")


class InteractionDialData(DataSource):
    """Binary labels whose dependence on two modalities is dialled.

    **Shares** (`shares`): each sample has a mechanism. Modality m shows a bit b_m: with R and both
    are the label; with U_<m> only b_m is, and the other bit is random (or wrong, `other` =
    "wrong"); with AS both are wrong; with xor the label is b_1 xor b_2. The mechanism itself can be
    read from a joint cue only: each modality shows a symbol, and the sum of the two symbols modulo
    their number is the mechanism; each symbol alone is uniform.

    **Weights** (`weights`): all samples are alike, with log-odds w_1 s_1 + w_2 s_2 + w_x c_1 c_2,
    where s_m is normal and c_m is a sign, each on a direction of its own in modality m. Without the
    last term modalities are independent given their scores (uniqueness, additive); alone it is
    synergy.

    Every modality adds normal noise in all D directions.

    Source: MMoE (Yu et al. 2024) for the mechanisms, I2M2 (Madaan et al. 2024) for the sum.

    Args:
        data_dir: not used.
        shares: mechanism -> share of the samples; made to sum to 1.
        weights: summand -> weight in the log-odds, instead of shares.
        other: "random" or "wrong", the other modality's bit under uniqueness.
        cue: False hides the mechanism.
        noise: standard deviation in each direction; a bit or a symbol has strength 1.
        width: D.
        sizes: rows of the training, validation and test split.
        seed: of everything.

    Raises:
        ConfigError: a value that cannot work.
    """

    name = "interaction_dial"
    modalities = (FIRST, SECOND)
    label_names = ("no", "yes")
    problem_type = SINGLE_LABEL
    license = "made by this program; no rights are claimed"

    def __init__(
        self,
        data_dir: str | None = None,
        *,
        shares: Mapping[str, float] | None = None,
        weights: Mapping[str, float] | None = None,
        other: str = "random",
        cue: bool = True,
        noise: float = 0.25,
        width: int = 16,
        sizes: tuple[int, int, int] | list[int] = (2000, 500, 2000),
        seed: int = 0,
    ) -> None:
        super().__init__(data_dir)
        if shares is not None and weights is not None:
            raise ConfigError("interaction_dial takes shares or weights, not both; drop one.")
        default = {"R": 0.35, "U_first": 0.2, "U_second": 0.2, "AS": 0.25}
        self.shares = None if weights is not None else _checked(shares or default, MECHANISMS)
        self.weights = None if weights is None else _checked(weights, SUMMANDS)
        self.other, self.cue, self.noise, self.width = other, cue, noise, width
        self.sizes, self.seed = dict(zip(SPLITS, sizes, strict=False)), seed
        self._check_numbers()
        about = {"width": width, "length": 1, "mean": None, "std": None}
        self.sequences = {name: about for name in self.modalities}

    def _check_numbers(self) -> None:
        if self.other not in ("random", "wrong"):
            raise ConfigError(f"other ({self.other!r}) must be random or wrong.")
        if self.width < CUES + 1:
            raise ConfigError(f"width ({self.width}) must be at least {CUES + 1}.")
        if not 0 <= self.noise < float("inf"):
            raise ConfigError(f"noise ({self.noise}) must be finite and not negative.")
        if len(self.sizes) != len(SPLITS) or min(self.sizes.values()) < 1:
            raise ConfigError(f"sizes must be three numbers from 1, of {', '.join(SPLITS)}.")

    def splits(self) -> tuple[str, ...]:
        """Train, validation and test."""
        return SPLITS

    def stream(self, split: str) -> datasets.IterableDataset:
        """Rows in the order in which they were drawn."""
        label_N, x_N2D, _ = self.arrays(split)
        rows = {
            "id": [f"{split}-{n}" for n in range(len(label_N))],
            "label": label_N.tolist(),
            **{name: [x.tobytes() for x in x_N2D[:, m]] for m, name in enumerate(self.modalities)},
        }
        return datasets.Dataset.from_dict(rows).to_iterable_dataset()

    def to_sample(self, row: dict[str, Any]) -> Sample:
        """Two vectors as sequences of one step."""
        return Sample(row["id"], {name: row[name] for name in self.modalities}, row["label"])

    def size(self, split: str) -> int:
        """Rows of a split."""
        return self.sizes[self.check_split(split)]

    def fingerprint(self) -> str:
        """sha256 of the options, which say everything."""
        return hashlib.sha256(json.dumps(self._options(), sort_keys=True).encode()).hexdigest()

    def _options(self) -> dict[str, Any]:
        names = ("name", "shares", "weights", "other", "cue", "noise", "width", "sizes", "seed")
        return {name: getattr(self, name) for name in names}

    def arrays(self, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Labels (N,) int64, modalities (N, 2, D) float32, and the truth of each sample.

        The truth is (N, 3) int64: place of the mechanism in `MECHANISMS` and the two bits; with
        weights it is (N, 2), the signs.
        """
        self.check_split(split)
        rng = np.random.default_rng([self.seed, SPLITS.index(split)])
        draw = self._by_shares if self.weights is None else self._by_weights
        label_N, x_N2D, truth = draw(rng, self.sizes[split])
        x_N2D += self.noise * rng.standard_normal(x_N2D.shape)
        return label_N, x_N2D.astype(FLOAT), truth

    @cached_property
    def directions(self) -> np.ndarray:
        """Orthonormal directions (2, 1 + CUES, D) of each modality; the same for all splits."""
        rng = np.random.default_rng([self.seed, len(SPLITS)])
        return np.stack(
            [np.linalg.qr(rng.standard_normal((self.width, CUES + 1)))[0].T for _ in range(2)]
        )

    def _by_shares(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, ...]:
        assert self.shares is not None  # the caller looked
        names = list(self.shares)
        share = np.array(list(self.shares.values()))
        pick_N = rng.choice(len(names), size=count, p=share / share.sum())
        mechanism_N = np.array([MECHANISMS.index(name) for name in names])[pick_N]
        label_N = rng.integers(0, 2, count)
        bit_N2 = self._bits(rng, mechanism_N, label_N)
        sign_N2 = 2.0 * bit_N2 - 1
        x_N2D = sign_N2[:, :, None] * self.directions[None, :, 0]
        if self.cue:
            symbol_N = rng.integers(0, len(names), count)
            symbol_N2 = np.stack([symbol_N, (pick_N - symbol_N) % len(names)], axis=1)
            for m in range(2):
                x_N2D[:, m] += self.directions[m, 1 + symbol_N2[:, m]]
        return label_N, x_N2D, np.column_stack([mechanism_N, bit_N2])

    def _bits(
        self, rng: np.random.Generator, mechanism_N: np.ndarray, label_N: np.ndarray
    ) -> np.ndarray:
        """The bits (N, 2) that the modalities show."""
        wrong_N, random_N = 1 - label_N, rng.integers(0, 2, len(label_N))
        other_N = random_N if self.other == "random" else wrong_N
        pairs = [  # in the order of MECHANISMS
            (label_N, label_N),
            (label_N, other_N),
            (other_N, label_N),
            (wrong_N, wrong_N),
            (random_N, random_N ^ label_N),
        ]
        table_QN2 = np.array([np.column_stack(pair) for pair in pairs])
        return table_QN2[mechanism_N, np.arange(len(label_N))]

    def _by_weights(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, ...]:
        assert self.weights is not None  # the caller looked
        score_N2 = rng.standard_normal((count, 2))
        sign_N2 = 2 * rng.integers(0, 2, (count, 2)) - 1
        odds_N = (
            self.weights.get("first", 0.0) * score_N2[:, 0]
            + self.weights.get("second", 0.0) * score_N2[:, 1]
            + self.weights.get("xor", 0.0) * sign_N2.prod(1)
        )
        label_N = (rng.random(count) < 1 / (1 + np.exp(-odds_N))).astype(np.int64)
        x_N2D = score_N2[:, :, None] * self.directions[None, :, 0]
        x_N2D += sign_N2[:, :, None] * self.directions[None, :, 1]
        return label_N, x_N2D, sign_N2


def _checked(values: Mapping[str, float], known: tuple[str, ...]) -> dict[str, float]:
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"interaction_dial knows no {name!r}; {nearest(name, list(known))}")
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{name} ({value}) must be finite and not negative.")
    if not sum(values.values()) > 0:
        raise ConfigError(f"all of {', '.join(known)} are 0; give one of them a value above 0.")
    return {name: float(value) for name, value in values.items()}
