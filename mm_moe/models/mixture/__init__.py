"""A variational autoencoder whose posterior is a mixture of one expert per modality."""

from mm_moe.models.mixture.configuration import MixtureVAEConfig
from mm_moe.models.mixture.modeling import MixtureOutput, MixtureVAE

__all__ = ["MixtureOutput", "MixtureVAE", "MixtureVAEConfig"]
