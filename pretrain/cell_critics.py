"""The play between the cell autoencoder and the critics of its outputs.

Critics are where the genes are: with the expert of their species.

R cells of one species where its expert is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm_moe.cells.critic import OutputCritic, critic_loss, fooling_loss, roc_auc
from mm_moe.cells.passes import Crossing, Passes
from mm_moe.cells.species import Generated
from mm_moe.moe.placed import Placement
from mm_moe.training.discriminator import Discriminator


class CriticPlay:
    """The critics of the species held here.

    Args:
        critics: species -> its critic, in the order of the experts.
        placement: of the experts.
        cells_are_real: real are cells; otherwise what a decoder makes of its own species' cells.
        kind: of loss, see `critic_loss`.
        steps: of a critic for each of the model.
        learning_rate: of their Adam.
        most_auc: a critic that tells real from generated better than this rests.
    """

    def __init__(
        self,
        critics: dict[str, OutputCritic],
        *,
        placement: Placement,
        cells_are_real: bool,
        kind: str,
        steps: int,
        learning_rate: float,
        most_auc: float,
    ) -> None:
        self.placement, self.cells_are_real, self.kind = placement, cells_are_real, kind
        self.steps, self.most_auc = steps, most_auc
        self.held = {
            name: Discriminator(
                critic, learning_rate=learning_rate, sum_over=placement.sum_over_holders
            )
            for name, critic in critics.items()
        }

    def play(
        self, passes: Passes, generated: list[Generated], crossing: Crossing
    ) -> tuple[Tensor, Tensor]:
        """Train the critics on detached values, then let the model try to fool them.

        Every holder of a species makes the same calls.

        Returns:
            What the model pays, as a sum over cells here that becomes a mean over generated cells
            when it is divided by the number of cells; and the mean area under the ROC curve of the
            critics here.
        """
        total, areas = None, []
        for place, critic in enumerate(self.held.values()):
            own, cross = generated[place].profile, crossing.generated[place].profile
            real, fake = own.detach(), cross
            if self.cells_are_real:
                real, fake = passes.cells.genes[place].profile, torch.cat([own, cross])
            areas.append(self._train(critic, real, fake.detach()))
            paid = fooling_loss(critic.module(fake), kind=self.kind).sum()
            total = paid if total is None else total + paid
        assert total is not None  # every process holds an expert
        total = total / 2 if self.cells_are_real else total  # twice as many are generated
        return total, total.new_tensor(sum(areas) / len(areas))

    def _train(self, critic: Discriminator, real: Tensor, fake: Tensor) -> float:
        """Some steps, if there are cells and the critic is not too good; its area before them."""
        with torch.no_grad():
            area = roc_auc(critic.module(real), critic.module(fake))
        mine = real.new_tensor([len(real), len(fake), area * len(real)])
        num_real, num_fake, areas = self.placement.sum_over_holders(mine).tolist()
        if not num_real or not num_fake:
            return 0.5
        if areas / num_real > self.most_auc:
            return areas / num_real

        def loss() -> Tensor:
            of_real, of_fake = critic_loss(critic.module(real), critic.module(fake), kind=self.kind)
            return of_real.sum() / num_real + of_fake.sum() / num_fake

        for _ in range(self.steps):
            critic.step(loss)
        return areas / num_real
