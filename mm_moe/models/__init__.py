"""Models as Hugging Face folders; importing this package registers them with AutoModel."""

from transformers import AutoConfig, AutoModel

from mm_moe.models.building import build_model
from mm_moe.models.configuration import MultimodalMoEConfig
from mm_moe.models.modeling import MultimodalMoEModel
from mm_moe.models.output import MultimodalMoEOutput
from mm_moe.models.processing import processors_for, save_processors

AutoConfig.register(MultimodalMoEConfig.model_type, MultimodalMoEConfig)
AutoModel.register(MultimodalMoEConfig, MultimodalMoEModel)

__all__ = [
    "MultimodalMoEConfig",
    "MultimodalMoEModel",
    "MultimodalMoEOutput",
    "build_model",
    "processors_for",
    "save_processors",
]
