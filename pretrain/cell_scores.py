"""What held-out cells cost a cell autoencoder.

N cells of a batch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mm_moe.batch import Batch
from mm_moe.cells.core import Posterior
from mm_moe.training.held_out import HeldOut


class CellScores(HeldOut):
    """Scores at the means of the posteriors: nothing is drawn.

    What training weighs (balance of species, annealing, free bits, adversaries) is left out, so
    that scores of one step compare with those of any other, and of a run with other weights.
    """

    def held_out(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """Of each cell: "reconstruction", "kl_nats", their sum "loss", and by species.

        "reconstruction" is the loss of the model's likelihood, a sum over genes, of the latent's
        mean; "SPECIES_reconstruction" is that of the cells of one species. As a cell is rebuilt
        from the mean and not from draws, "loss" lies below minus the evidence bound, mostly.
        """
        output = model(**batch)
        kl_N = Posterior(output.mu, output.logvar, {}).kl()
        each_N = output.losses["reconstruction"]
        found = {"loss": each_N + kl_N, "reconstruction": each_N, "kl_nats": kl_N}
        parts = each_N.split(batch.present.sum(0).tolist())  # the output is sorted by species
        for name, own_N in zip(model.modalities, parts, strict=True):
            found[f"{name}_reconstruction"] = own_N
        return found
