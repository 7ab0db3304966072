"""Models as Hugging Face folders; importing this package registers them with AutoModel."""

from transformers import AutoConfig, AutoModel

from mm_moe.models.building import build_model
from mm_moe.models.composed import ComposedModel
from mm_moe.models.composed_configuration import ComposedConfig
from mm_moe.models.configuration import MultimodalMoEConfig
from mm_moe.models.modeling import MultimodalMoEModel
from mm_moe.models.output import MultimodalMoEOutput
from mm_moe.models.own import OwnModel
from mm_moe.models.processing import processors_for, save_processors
from mm_moe.registry import MODELS

AutoConfig.register(MultimodalMoEConfig.model_type, MultimodalMoEConfig)
AutoConfig.register(ComposedConfig.model_type, ComposedConfig)
AutoModel.register(MultimodalMoEConfig, MultimodalMoEModel)
AutoModel.register(ComposedConfig, ComposedModel)
for _name in MODELS:  # by their names: these rooms stand above this one
    _own: type[OwnModel] = MODELS.resolve(_name)
    assert _own.config_class is not None
    AutoConfig.register(_name, _own.config_class)
    AutoModel.register(_own.config_class, _own)

__all__ = [
    "ComposedConfig",
    "ComposedModel",
    "MultimodalMoEConfig",
    "MultimodalMoEModel",
    "MultimodalMoEOutput",
    "OwnModel",
    "build_model",
    "processors_for",
    "save_processors",
]
