"""A conditional, adversarial autoencoder for cells of species that share no gene list.

One encoder and one decoder per species (`species.py`) around one shared variational core
(`core.py`), conditioned on what is known of a cell (`conditions.py`).
"""

import mm_moe.models  # noqa: F401  # registers the model with AutoModel
