"""Image models of `timm` as an image tower, by name, with or without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mm_moe.backbones.base import Backbone, ProcessorNeeds, Tower, check_options
from mm_moe.backbones.library import first_line
from mm_moe.backbones.timm_towers import ConvImageTower, VitImageTower, is_plain_vit
from mm_moe.batch import IMAGE
from mm_moe.errors import CheckpointError, ConfigError
from mm_moe.registry import nearest

OPTIONS = [
    "model",
    "model_args",
    "image_size",
    "new_blocks",
    "new_width",
    *("image_mean", "image_std"),
]
HUB = "timm"


class TimmBackbone(Backbone):
    """An image tower alone, to combine with a text tower in `dual`, or for images alone.

    Args:
        settings: "model", a name of `timm.list_models()`; "model_args", further arguments of
            `timm.create_model`; "image_size" in pixels; for a convolutional network "new_blocks"
            (default 0) and "new_width" (default 256), transformer blocks on its feature map.
        modalities: ("image",).
        net: a ready model to take apart instead of a new random one.

    Raises:
        ConfigError: an unknown model, or one that is neither a plain vision transformer nor a
            convolutional network.
    """

    supported = (IMAGE,)

    def __init__(
        self,
        settings: dict[str, Any],
        *,
        modalities: tuple[str, ...] = (IMAGE,),
        net: Any = None,
    ) -> None:
        complete = complete_settings(settings)
        super().__init__(complete, modalities=modalities)
        net = create(complete) if net is None else net
        tower: Tower
        if is_plain_vit(net):
            if complete["new_blocks"]:
                raise ConfigError(
                    "backbone_config.new_blocks are for convolutional networks; "
                    f"{complete['model']!r} has blocks of its own."
                )
            tower = VitImageTower(net)
        else:
            check_convolutional(net, complete["model"])
            tower = ConvImageTower(
                net,
                image_size=complete["image_size"],
                num_blocks=complete["new_blocks"],
                width=complete["new_width"],
            )
        self.set_towers({IMAGE: tower})

    @classmethod
    def processor_needs(cls, settings: dict[str, Any]) -> ProcessorNeeds:
        """Size and normalisation of the model's weights."""
        complete = complete_settings(settings)
        return ProcessorNeeds(
            image_size=complete["image_size"],
            image_mean=list(complete["image_mean"]),
            image_std=list(complete["image_std"]),
        )

    @classmethod
    def load(
        cls, pretrained: str, *, settings: dict[str, Any], modalities: tuple[str, ...]
    ) -> TimmBackbone:
        """Weights from a file (safetensors, or a pickle of tensors only), or "timm" for the Hub's.

        A file whose names differ but whose tensors have the same shapes in the same order fits too
        (the same network from another library).

        Raises:
            CheckpointError: nothing readable, or weights of another model.
        """
        complete = complete_settings(settings)
        net = create(complete, from_hub=pretrained == HUB)
        if pretrained != HUB:
            fill(net, read_tensors(Path(pretrained)), pretrained)
        return cls(complete, modalities=modalities, net=net)


def complete_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with every option, defaults from the model's own entry in `timm`."""
    check_options("timm", settings, OPTIONS)
    name = settings.get("model", "")
    if not timm.is_model(name):
        raise ConfigError(
            f"unknown timm model {name!r}; {nearest(name, timm.list_models())}"
            if name
            else "backbone_config.model is needed for timm, such as 'vit_small_patch16_224'."
        )
    entry: Any = timm.get_pretrained_cfg(name)
    size = entry.input_size[-1] if entry else 224
    return {
        "model": name,
        "model_args": dict(settings.get("model_args", {})),
        "image_size": settings.get("image_size", size),
        "new_blocks": settings.get("new_blocks", 0),
        "new_width": settings.get("new_width", 256),
        "image_mean": list(settings.get("image_mean", entry.mean if entry else [0.5] * 3)),
        "image_std": list(settings.get("image_std", entry.std if entry else [0.5] * 3)),
    }


def create(settings: dict[str, Any], *, from_hub: bool = False) -> Any:
    """The model without classifier; a vision transformer for the image size asked for."""
    arguments = dict(settings["model_args"])
    if "vit" in settings["model"] or "deit" in settings["model"]:
        arguments.setdefault("img_size", settings["image_size"])
    try:
        return timm.create_model(settings["model"], pretrained=from_hub, num_classes=0, **arguments)
    except (TypeError, ValueError, RuntimeError, OSError, AssertionError) as error:
        if from_hub:
            raise CheckpointError(
                f"no weights for the timm model {settings['model']!r} ({first_line(error)}); give "
                "a file of weights."
            ) from error
        raise ConfigError(
            f"timm cannot make {settings['model']!r} with {arguments}: {first_line(error)}"
        ) from error


def check_convolutional(net: nn.Module, name: str) -> None:
    """Raise ConfigError unless the model puts out a feature map (N, C, H, W)."""
    convolutional = not any(
        isinstance(module, nn.MultiheadAttention) or "Attention" in type(module).__name__
        for module in net.modules()
    )
    if not convolutional:
        raise ConfigError(
            f"the timm model {name!r} is neither a plain vision transformer nor a convolutional "
            "network; take a vit_*, deit_* or a network such as tf_efficientnet_lite0."
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, in the file's order; code in a pickle is refused.

    Raises:
        CheckpointError: no such file, or not one of tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError) as error:
        raise CheckpointError(
            f"no weights could be read from {str(path)!r} ({first_line(error)}); give a file of "
            "weights, or 'timm' for those of the Hub."
        ) from error
    except Exception as error:  # pickle.UnpicklingError and what damaged bytes make of it
        raise CheckpointError(
            f"{str(path)!r} is not a file of tensors alone ({type(error).__name__}); give a "
            ".safetensors file."
        ) from error
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def fill(net: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load weights by name, or by order where all names differ; a classifier is left out.

    Raises:
        CheckpointError: names, or shapes in their order, that do not fit.
    """
    wanted = net.state_dict()
    if set(wanted) <= set(state):
        chosen = {name: state[name] for name in wanted}
    else:
        chosen = dict(zip(wanted, state.values(), strict=False))
    bad = [n for n in wanted if n not in chosen or chosen[n].shape != wanted[n].shape]
    if bad:
        raise CheckpointError(
            f"{source!r} does not fit this timm model: {len(bad)} of {len(wanted)} tensors differ, "
            f"the first is {bad[0]!r}; use the model that the weights were made with."
        )
    net.load_state_dict(chosen)
