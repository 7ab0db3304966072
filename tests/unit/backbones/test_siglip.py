"""The SigLIP towers give the library's own numbers, with its own tokenizer, and fail clearly."""

import pytest
import sentencepiece
import torch
from PIL import Image
from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipTokenizer

from mm_moe.backbones.siglip import SiglipBackbone
from mm_moe.errors import CheckpointError, ConfigError
from mm_moe.models import MultimodalMoEConfig, MultimodalMoEModel, build_model, processors_for
from mm_moe.models.processing import save_processors

torch.set_num_threads(1)
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
WORDS = ["a photo of a red apple", "green pear", "the yellow lemon and the blue sky"]


def library_model() -> SiglipModel:
    torch.manual_seed(0)
    config = SiglipConfig(
        text_config=TOWER | {"vocab_size": 60, "max_position_embeddings": 10, "pad_token_id": 1},
        vision_config=TOWER | {"image_size": 16, "patch_size": 8},
    )
    return SiglipModel(config).eval()


@pytest.fixture
def folder(tmp_path):
    """A SigLIP checkpoint as it is published: weights, sentencepiece model, image settings."""
    source = tmp_path / "siglip"
    library_model().save_pretrained(source)
    (tmp_path / "words.txt").write_text("\n".join(WORDS * 30))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "words.txt"),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=28,
        **{"pad_id": 3, "unk_id": 2, "eos_id": 1, "bos_id": -1, "minloglevel": 2},
    )
    tokenizer = SiglipTokenizer(str(tmp_path / "spiece.model"), model_max_length=10)
    tokenizer.save_pretrained(source)
    SiglipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(source)
    return source


def test_features_equal_the_librarys_own_however_short_the_batch(folder):
    library = SiglipModel.from_pretrained(folder).eval()
    backbone = SiglipBackbone.load(str(folder), settings={}, modalities=("image", "text")).eval()
    ids_NL = torch.tensor([[7, 9, 11, 1], [8, 1, 0, 0]])
    mask_NL = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    padded_NL = torch.tensor([[7, 9, 11, *[1] * 7], [8, *[1] * 9]])
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        image = library.get_image_features(pixel_values=pixels).pooler_output
        text = library.get_text_features(input_ids=padded_NL).pooler_output
        ours = backbone.encode("text", {"input_ids": ids_NL, "attention_mask": mask_NL})[0]
        assert torch.allclose(ours, text, atol=1e-5)
        assert torch.allclose(
            backbone.encode("image", {"pixel_values": pixels})[0], image, atol=1e-5
        )
    assert text.abs().mean() > 1e-3
    assert not torch.allclose(text[0], text[1], atol=1e-3)


def test_a_model_with_its_sentencepiece_tokenizer_stands_alone(folder, tmp_path):
    config = MultimodalMoEConfig(backbone="siglip", moe={"num_experts": 2}, num_labels=3)
    model = build_model(config, pretrained=str(folder)).eval()
    processors = processors_for(model.config, source=str(folder))
    images = [Image.new("RGB", (16, 16), "red"), Image.new("RGB", (20, 31), "blue")]
    inputs = {"image": processors["image"](images), "text": processors["text"](WORDS[:2])}
    # the fast path and the library's: red is 1, other channels -1 in [-1, 1]
    assert inputs["image"]["pixel_values"][0, :, 0, 0].tolist() == pytest.approx([1, -1, -1])
    fast = processors["image"](images[:1])["pixel_values"]
    assert torch.allclose(fast, inputs["image"]["pixel_values"][:1], atol=1e-6)
    model.save_pretrained(tmp_path / "saved")
    save_processors(processors, tmp_path / "saved")
    again = MultimodalMoEModel.from_pretrained(tmp_path / "saved").eval()
    texts = processors_for(again.config)["text"](WORDS[:2])
    assert torch.equal(texts["input_ids"], inputs["text"]["input_ids"])
    present = torch.ones(2, 2, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(again(present, inputs).logits, model(present, inputs).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_config": {"projection_size": 9}}, r"hidden_size \(768\).*projection_size \(9\)"),
        ({"vision_config": {"vision_use_head": False}}, "vision_use_head"),
        ({"vision_config": {"hidden_size": "wide"}}, "not a SiglipConfig"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        SiglipBackbone.processor_needs(settings)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    library_model().text_model.save_pretrained(tmp_path / "part")
    for name in ("part", "nothing"):
        with pytest.raises(CheckpointError, match="SigLIP checkpoint"):
            SiglipBackbone.load(str(tmp_path / name), settings={}, modalities=("text",))
