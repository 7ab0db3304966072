"""Hard negatives: a wrong partner for each pair, drawn by similarity from the batch of all ranks.

The draw is a function of the samples' ids and of the set of pairs in the batch, not of the ranks
that hold them nor of their order: the same global batch gives the same negatives on any number of
processes.

N pairs of this rank, B its samples, G samples of all ranks, L tokens of a text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mm_moe.training.collectives import gather_rows

# splitmix64 (Steele et al. 2014); torch's int64 wraps around as its unsigned integers do
GOLDEN, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
WANTS_TEXT, WANTS_IMAGE = 1, 2


def mixed(key: Tensor) -> Tensor:
    """A well spread int64 for each int64."""
    key = key + GOLDEN
    key = (key ^ _shifted(key, 30)) * FIRST
    key = (key ^ _shifted(key, 27)) * SECOND
    return key ^ _shifted(key, 31)


def _shifted(key: Tensor, places: int) -> Tensor:
    """Right shift that fills with zeros."""
    return (key >> places) & ((1 << (64 - places)) - 1)


def id_keys(ids: Sequence[str], *, seed: int) -> Tensor:
    """An int64 (B,) for each sample id."""
    digests = [hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest() for name in ids]
    return torch.tensor(
        [int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64
    )


def text_keys(ids_NL: Tensor, mask_NL: Tensor) -> Tensor:
    """An int64 (N,) for each text, the same where the real tokens are."""
    place_L = torch.arange(ids_NL.shape[1], device=ids_NL.device)
    key_NL = mixed(mixed(ids_NL.long()) + place_L)
    return (key_NL * mask_NL.long()).sum(1)


def gumbel(key_N: Tensor, key_G: Tensor, *, salt: Tensor) -> Tensor:
    """Gumbel noise (N, G) in float64, a function of both keys and the salt."""
    bits_NG = mixed(mixed(key_N + salt)[:, None] ^ mixed(mixed(key_G) + salt)[None])
    uniform_NG = (_shifted(bits_NG, 11).double() + 0.5) * 2.0**-53
    return -(-uniform_NG.log()).log()


@dataclass(frozen=True)
class Candidates:
    """The samples of all ranks as candidates, as far as a draw needs to know them.

    Attributes:
        keys: int64 (G,), of their ids.
        texts: int64 (G,), of their texts.
        complete: bool (G,), which of them are pairs.
    """

    keys: Tensor
    texts: Tensor
    complete: Tensor

    @classmethod
    def of(cls, keys_B: Tensor, texts_B: Tensor, complete_B: Tensor) -> tuple[Candidates, int]:
        """Those of all ranks, and the number of this rank's first; a collective."""
        packed_G3, first = gather_rows(torch.stack([keys_B, texts_B, complete_B.long()], dim=1))
        keys_G, texts_G, complete_G = packed_G3.unbind(1)
        return cls(keys_G, texts_G, complete_G.bool()), first

    def draw(self, logits_NG: Tensor, own_N: Tensor, *, what: int) -> tuple[Tensor, Tensor]:
        """(number (N,) of the negative of each pair, whether there is one (N,) bool).

        Pair j is drawn for pair i with a probability proportional to exp(logit ij), from all pairs
        whose text is another. Two pairs with one text fit each other, so neither is the other's
        negative (the paper and LAVIS only leave the pair itself out).

        Args:
            logits_NG: scaled similarities of what is asked and the candidates.
            own_N: numbers of this rank's pairs.
            what: `WANTS_TEXT` or `WANTS_IMAGE`, so that the two draws differ.
        """
        allowed_NG = self.complete[None] & (self.texts[own_N, None] != self.texts[None])
        salt = mixed((self.keys * self.complete).sum() + what)
        score_NG = logits_NG.double() + gumbel(self.keys[own_N], self.keys, salt=salt)
        chosen_N = score_NG.masked_fill(~allowed_NG, -torch.inf).argmax(1)
        return chosen_N, allowed_NG.any(1)
