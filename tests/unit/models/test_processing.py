"""Processors give the library's numbers and survive in the library's files."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessor

from mm_moe.backbones.clip_small import SMALL_CLIP_FOLDER
from mm_moe.errors import ConfigError
from mm_moe.models import MultimodalMoEConfig, processors_for, save_processors

TOWER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    generator = np.random.default_rng(width)
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    pixels = generator.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode=None).convert(mode)


@pytest.fixture(scope="module")
def processors():
    return processors_for(MultimodalMoEConfig())


@pytest.mark.parametrize("size", [(64, 64), (96, 70), (20, 33)])
def test_pixels_equal_the_librarys(processors, size):
    images = [picture(*size), picture(*size)]
    library = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    expected = library(images=images, return_tensors="pt")["pixel_values"]
    given = processors["image"](images)["pixel_values"]
    assert given.shape == (2, 3, 64, 64)
    assert torch.allclose(given, expected, atol=1e-5)


def test_a_white_pixel_by_hand(processors):
    white = processors["image"]([Image.new("RGB", (64, 64), "white")])["pixel_values"]
    assert white[0, 0, 0, 0].item() == pytest.approx((1 - 0.48145466) / 0.26862954)


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_other_modes_become_rgb(processors, mode):
    assert processors["image"]([picture(64, 64, mode)])["pixel_values"].shape == (1, 3, 64, 64)


def test_text_is_padded_to_the_longest_and_cut(processors):
    rows = processors["text"](["cat", "", "word " * 60])
    assert rows["input_ids"].shape == rows["attention_mask"].shape == (3, 24)
    assert rows["input_ids"][1, :2].tolist() == [0, 1]
    assert (rows["input_ids"] == 1).any(1).all()  # every row has its end
    assert processors["text"](["cat"])["input_ids"].shape[1] < 6


def test_texts_can_be_filled_up_with_a_token(processors):
    filled = processors_for(MultimodalMoEConfig(pad_text=7))["text"](["cat", "a red pear"])
    plain = processors["text"](["cat", "a red pear"])
    assert filled["input_ids"].shape == (2, 24)
    mask = filled["attention_mask"].bool()
    assert torch.equal(mask[:, : plain["input_ids"].shape[1]], plain["attention_mask"].bool())
    assert torch.equal(filled["input_ids"][mask], plain["input_ids"][plain["attention_mask"] == 1])
    assert (filled["input_ids"][~mask] == 7).all()
    with pytest.raises(
        ConfigError, match=r"pad_text \(4096\) must be a token id between 0 and 4095"
    ):
        processors_for(MultimodalMoEConfig(pad_text=4096))


def test_saved_files_are_the_librarys_own(processors, tmp_path):
    save_processors(processors, tmp_path)
    library = AutoProcessor.from_pretrained(tmp_path)
    batch = library(text=["a cat"], images=[picture(64, 64)], return_tensors="pt")
    ours = processors["text"](["a cat"]) | processors["image"]([picture(64, 64)])
    assert torch.equal(batch["input_ids"], ours["input_ids"])
    assert torch.allclose(batch["pixel_values"], ours["pixel_values"], atol=1e-5)


def test_a_models_folder_gives_its_processors_back(processors, tmp_path):
    config = MultimodalMoEConfig(backbone_config={"image_size": 32, "max_text_tokens": 8})
    small = processors_for(config)
    config.save_pretrained(tmp_path)
    save_processors(small, tmp_path)
    again = processors_for(MultimodalMoEConfig.from_pretrained(tmp_path))
    assert again["image"]([picture(64, 64)])["pixel_values"].shape[-1] == 32
    assert again["text"](["word " * 60])["input_ids"].shape[1] == 8


@pytest.mark.parametrize("modality", ["image", "text"])
def test_one_modality_alone_survives(modality, tmp_path):
    config = MultimodalMoEConfig(modalities=[modality])
    processors = processors_for(config)
    assert list(processors) == [modality]
    config.save_pretrained(tmp_path)
    save_processors(processors, tmp_path)
    assert list(processors_for(MultimodalMoEConfig.from_pretrained(tmp_path))) == [modality]


def test_a_tokenizer_that_is_not_there_or_does_not_fit_is_named(tmp_path):
    def config(vocab_size):
        return MultimodalMoEConfig(
            backbone="clip",
            backbone_config={
                "text_config": TOWER | {"vocab_size": vocab_size},
                "vision_config": TOWER | {"image_size": 16, "patch_size": 8},
            },
        )

    with pytest.raises(ConfigError, match="no tokenizer found"):
        processors_for(config(5000))
    AutoTokenizer.from_pretrained(SMALL_CLIP_FOLDER).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has 4096 tokens, the text tower room for 40"):
        processors_for(config(40), source=str(tmp_path))
    given = processors_for(config(5000), source=str(tmp_path))
    assert given["image"]([picture(30, 20)])["pixel_values"].shape == (1, 3, 16, 16)
