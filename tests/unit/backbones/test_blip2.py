"""The BLIP-2 towers give the library's own numbers, dense or sparse, and fail clearly."""

import pytest
import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from mm_moe.backbones.blip2 import Blip2Backbone
from mm_moe.errors import CheckpointError, ConfigError
from mm_moe.models import MultimodalMoEConfig, MultimodalMoEModel, build_model
from mm_moe.moe.layer import moe_layers

torch.set_num_threads(1)
SHARED = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 16}
VISION = SHARED | {"intermediate_size": 24, "image_size": 16, "patch_size": 8}
QFORMER = SHARED | {"intermediate_size": 24, "vocab_size": 40, "max_position_embeddings": 9}
OPT = SHARED | {
    "model_type": "opt",
    "ffn_dim": 24,
    "vocab_size": 40,
    "max_position_embeddings": 9,
    "word_embed_proj_dim": 16,
    **{"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2},
}
T5 = {
    "model_type": "t5",
    "d_model": 16,
    "d_ff": 24,
    "d_kv": 6,
    "num_layers": 3,
    "num_heads": 2,
    "vocab_size": 40,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,
}
FIELDS = {
    "vision_config": VISION | {"initializer_range": 0.5},
    "qformer_config": QFORMER | {"initializer_range": 0.2},
    "text_config": OPT,
    "num_query_tokens": 4,
    "image_text_hidden_size": 8,
}
IDS_NL = torch.tensor([[5, 7, 9, 11], [6, 8, 0, 0]])
MASK_NL = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
INPUTS = {
    "image": {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.manual_seed(0))},
    "text": {"input_ids": IDS_NL, "attention_mask": MASK_NL},
}


def library_model(kind, **changes):
    torch.manual_seed(0)
    text = kind is Blip2ForImageTextRetrieval
    fields = FIELDS | {
        "qformer_config": FIELDS["qformer_config"] | {"use_qformer_text_input": text}
    }
    model = kind(Blip2Config(**(fields | changes))).eval()
    torch.nn.init.normal_(model.query_tokens)  # the library's zeros make all queries alike
    return model


@pytest.mark.parametrize("blocks", ["qformer", "vision"])
def test_contrastive_features_equal_the_librarys_own(blocks, tmp_path):
    library = library_model(Blip2ForImageTextRetrieval)
    library.save_pretrained(tmp_path)
    projected = {}
    for name in ("vision_projection", "text_projection"):
        part = getattr(library, name)
        part.register_forward_hook(lambda _m, _i, out, name=name: projected.update({name: out}))
    backbone = Blip2Backbone.load(
        str(tmp_path), settings={"blocks": blocks}, modalities=("image", "text")
    ).eval()
    with torch.no_grad():
        library(**INPUTS["image"], **INPUTS["text"])
        image, _ = backbone.encode("image", INPUTS["image"])
        text, _ = backbone.encode("text", INPUTS["text"])
    assert torch.allclose(image, projected["vision_projection"].mean(1), atol=1e-5)
    assert torch.allclose(text, projected["text_projection"], atol=1e-5)
    for feature in (image, text):  # not equal by being the same for every row
        assert not torch.allclose(feature[0], feature[1], atol=1e-2)
    assert not any(p.requires_grad for n, p in backbone.named_parameters() if ".vision." in n)


@pytest.mark.parametrize("norm_first", [True, False])
def test_language_model_features_equal_the_librarys_own(norm_first, tmp_path):
    opt = OPT | {"do_layer_norm_before": norm_first, "word_embed_proj_dim": 16 if norm_first else 8}
    if not norm_first:  # as in OPT-350m
        opt |= {"word_embed_proj_dim": 8}
    library = library_model(Blip2ForConditionalGeneration, text_config=opt)
    if not norm_first:
        library.language_projection = torch.nn.Linear(16, 8)  # what the library cannot build
    backbone = Blip2Backbone(
        FIELDS | {"text": "language_model", "text_config": opt},
        modalities=("image", "text"),
        blip2=library,
    ).eval()
    with torch.no_grad():
        query = library.qformer(
            query_embeds=library.query_tokens.expand(2, -1, -1),
            encoder_hidden_states=library.vision_model(**INPUTS["image"]).last_hidden_state,
        ).last_hidden_state
        hidden = library.language_model.model(**INPUTS["text"]).last_hidden_state
        image, _ = backbone.encode("image", INPUTS["image"])
        text, _ = backbone.encode("text", INPUTS["text"])
    assert torch.allclose(image, library.language_projection(query).mean(1), atol=1e-5)
    assert torch.allclose(text, hidden[[0, 1], [3, 1]], atol=1e-5)


@pytest.mark.parametrize(
    ("text", "lm"), [("qformer", OPT), ("language_model", OPT), ("language_model", T5)]
)
def test_sparse_from_a_checkpoint_starts_dense_and_reloads_equal(text, lm, tmp_path):
    kind = Blip2ForImageTextRetrieval if text == "qformer" else Blip2ForConditionalGeneration
    library_model(kind, text_config=lm).save_pretrained(tmp_path / "library")
    models = [
        build_model(
            MultimodalMoEConfig(
                backbone="blip2", backbone_config={"text": text}, moe=moe, num_labels=3
            ),
            pretrained=str(tmp_path / "library"),
        ).eval()
        for moe in (None, {"num_experts": 2})
    ]
    assert len(moe_layers(models[1])) == 2  # block 1 of both towers
    present = torch.ones(2, 2, dtype=torch.bool)
    with torch.no_grad():
        dense, sparse = (model(present, INPUTS) for model in models)
        for name in ("image", "text"):
            assert torch.allclose(sparse.features[name], dense.features[name], atol=1e-5)
        models[1].save_pretrained(tmp_path / "saved")
        again = MultimodalMoEModel.from_pretrained(tmp_path / "saved").eval()
        assert torch.equal(again(present, INPUTS).logits, sparse.logits)


def test_a_padded_row_equals_the_row_alone():
    backbone = Blip2Backbone(FIELDS).eval()
    alone = {"input_ids": IDS_NL[1:, :2], "attention_mask": MASK_NL[1:, :2]}
    with torch.no_grad():
        both, _ = backbone.encode("text", INPUTS["text"])
        assert torch.allclose(backbone.encode("text", alone)[0], both[1:], atol=1e-6)


def test_random_weights_have_different_queries_and_images():
    backbone = Blip2Backbone({**FIELDS, "vision_config": VISION}).eval()
    assert backbone.towers["image"].query_tokens.std() > 0.01
    image, _ = backbone.encode("image", INPUTS["image"])
    assert not torch.allclose(image[0], image[1], atol=1e-7)
    assert all(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": "bert"}, "backbone_config.text 'bert' is unknown; known: language_model"),
        ({"block": "vision"}, "unknown blip2 option 'block'; did you mean blocks"),
        (
            {"text": "language_model", "text_config": {"model_type": "gpt2"}},
            "'gpt2' is not supported as a text tower",
        ),
        ({"num_query_tokens": "four"}, "not a Blip2Config"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        Blip2Backbone.processor_needs(settings)


def test_a_generating_checkpoint_is_no_retrieval_model(tmp_path):
    library_model(Blip2ForConditionalGeneration).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no complete BLIP-2 \(qformer\) checkpoint"):
        Blip2Backbone.load(str(tmp_path), settings={}, modalities=("text",))
