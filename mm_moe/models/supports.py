"""Support rows in a batch: training rows that are encoded beside the samples, for a fill.

They enter the towers as further samples behind the batch's own, each with only the modality that it
supports, so that a modality's own and support rows are one call of its tower.

Axes: B samples, M modalities, N packed rows of one modality, S support rows of one modality, W
samples with all support rows behind them, P tokens, H their width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_moe.backbones.base import Payload
from mm_moe.errors import DataError
from mm_moe.fill.base import SupportTokens

Supports = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class WideBatch:
    """A batch with its support rows behind it; without supports, the batch itself.

    Attributes:
        present_WM: of the samples, then of the support rows of each modality.
        rows: modality -> positions (N,) of its packed rows among the W.
        inputs: modality -> its packed payload.
        interaction_W: type of each sample's interaction, 0 for support rows.
        starts: modality -> where its support rows begin among the W.
    """

    present_WM: Tensor
    rows: dict[str, Tensor]
    inputs: Mapping[str, Payload]
    interaction_W: Tensor | None
    starts: dict[str, int]

    @classmethod
    def of(
        cls,
        present_BM: Tensor,
        rows: dict[str, Tensor],
        inputs: Mapping[str, Payload],
        *,
        interaction: Tensor | None,
        supports: Supports | None,
    ) -> WideBatch:
        """Put support rows behind the samples.

        Args:
            present_BM: of the samples.
            rows: of the samples' packed payloads, in the model's order of modalities.
            inputs: these payloads.
            interaction: (B,), if the data know it.
            supports: modality -> "inputs" (payload of S rows), "rows" (Q, N), "present" (S, M) and
                perhaps "index" (S,).

        Raises:
            DataError: supports of an unknown modality, or payloads that are not those S rows.
        """
        if not supports:
            return cls(present_BM, rows, inputs, interaction, {})
        modalities = list(rows)
        check_supports(supports, modalities)
        presents, places = [present_BM], {name: [found] for name, found in rows.items()}
        payloads = {name: [inputs[name]] if len(rows[name]) else [] for name in modalities}
        starts, count = {}, len(present_BM)
        for name, support in supports.items():
            present_SM = support["present"]
            starts[name] = count
            if len(present_SM):
                place_S = torch.arange(len(present_SM), device=present_BM.device) + count
                places[name].append(place_S)
                payloads[name].append(support["inputs"])
            presents.append(present_SM)
            count += len(present_SM)
        if interaction is not None:
            interaction = F.pad(interaction, (0, count - len(present_BM)))
        return cls(
            torch.cat(presents),
            {name: torch.cat(found) for name, found in places.items()},
            {name: joined(name, found) for name, found in payloads.items() if found},
            interaction,
            starts,
        )

    def tokens(
        self, features: Mapping[str, Tensor], supports: Supports | None, *, num_tokens: int
    ) -> dict[str, SupportTokens] | None:
        """What a fill gets: the encoded support rows of each modality, cut into P tokens.

        Args:
            features: modality -> (W, P * H).
            supports: what `of` was given.
            num_tokens: P.
        """
        if supports is None:
            return None
        found = {}
        for name, support in supports.items():
            start, size = self.starts[name], len(support["present"])
            tokens_SPH = features[name][start : start + size].unflatten(-1, (num_tokens, -1))
            found[name] = SupportTokens(
                tokens_SPH, support["rows"], support["present"], support.get("index")
            )
        return found


def joined(name: str, payloads: Sequence[Payload]) -> Payload:
    """One payload of all rows; sequences of another length are filled up with zeros.

    Raises:
        DataError: payloads that hold different things.
    """
    if len(payloads) == 1:
        return payloads[0]
    keys = set(payloads[0])
    if any(set(payload) != keys for payload in payloads):
        found = sorted({" ".join(sorted(payload)) for payload in payloads})
        raise DataError(
            f"samples and supports of {name!r} hold different things ({'; '.join(found)}); collate "
            "both with the same processor."
        )
    return {key: _stacked([payload[key] for payload in payloads]) for key in payloads[0]}


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    sizes = [max(part.shape[d] for part in parts) for d in range(1, parts[0].ndim)]
    padded = []
    for part in parts:
        room = [
            pad for d in reversed(range(len(sizes))) for pad in (0, sizes[d] - part.shape[d + 1])
        ]
        padded.append(F.pad(part, room) if any(room) else part)
    return torch.cat(padded)


def check_supports(supports: Supports, modalities: Sequence[str]) -> None:
    """Refuse supports that contradict themselves.

    Raises:
        DataError: names the modality and the numbers.
    """
    for name, support in supports.items():
        if name not in modalities:
            raise DataError(
                f"supports of {name!r}; the model has the modalities {', '.join(modalities)}."
            )
        present_SM, rows_QN = support["present"], support["rows"]
        size = len(present_SM)
        if present_SM.shape != (size, len(modalities)) or rows_QN.ndim != 2:
            raise DataError(
                f"supports of {name!r}: present has shape {tuple(present_SM.shape)} and rows "
                f"{tuple(rows_QN.shape)}; they must be (S, {len(modalities)}) and (Q, N)."
            )
        given = _num_rows(support["inputs"])
        if given != size:
            raise DataError(
                f"supports of {name!r} hold {given} rows, and {size} are described in present."
            )


def _num_rows(payload: Payload) -> int:
    return len(next(iter(payload.values()))) if payload else 0
