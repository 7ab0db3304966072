"""Local models as labellers: batches equal single rows, and the right words are read."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    OPTConfig,
    OPTForCausalLM,
)

from launch import prepare_data
from mm_moe.backbones.clip_small import SMALL_CLIP_FOLDER
from mm_moe.data.interactions.labeller_model import ImageModel, TextModel, answer_tokens
from mm_moe.data.interactions.question import Question
from mm_moe.data.interactions.table import InteractionTable
from mm_moe.errors import CheckpointError, ConfigError
from tests import raw_layouts

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
COLOURS = Question("Which colour?", ("red", "blue", "green"))


def tokenizer():
    return AutoTokenizer.from_pretrained(str(SMALL_CLIP_FOLDER))


def opt(vocab_size):
    return OPTConfig(
        **TINY,
        vocab_size=vocab_size,
        ffn_dim=24,
        word_embed_proj_dim=16,
        max_position_embeddings=200,
        init_std=0.5,
    )


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder, words = tmp_path_factory.mktemp("opt"), tokenizer()
    torch.manual_seed(0)
    OPTForCausalLM(opt(len(words))).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip2")
    images = BlipImageProcessor(size={"height": 16, "width": 16})
    processor = Blip2Processor(images, tokenizer(), num_query_tokens=3)
    config = Blip2Config(
        vision_config=TINY | {"intermediate_size": 24, "image_size": 16, "patch_size": 8},
        qformer_config=TINY | {"intermediate_size": 24, "encoder_hidden_size": 16},
        text_config=opt(len(processor.tokenizer)).to_dict(),
        num_query_tokens=3,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    Blip2ForConditionalGeneration(config).eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_rows_of_other_lengths_do_not_matter(text_folder):
    model = TextModel(text_folder, question=COLOURS)
    texts = ["the sky", "a very ripe tomato on the kitchen table", "grass"]
    together = model.scores(texts)
    alone = [model.scores([text])[0] for text in texts]
    assert together == pytest.approx(np.stack(alone), abs=1e-6)
    assert ((together > 0) & (together < 1)).all()
    assert together.sum(-1).max() < 1  # shares of the whole vocabulary


def test_scores_are_the_models_own_probabilities(text_folder):
    model, words = TextModel(text_folder, question=COLOURS), tokenizer()
    rows = words(COLOURS.ask("the sky"), return_tensors="pt")
    with torch.no_grad():
        prob = model.model(**rows).logits[0, -1].softmax(-1)
    ids = {word: words(word, add_special_tokens=False)["input_ids"][0] for word in COLOURS.answers}
    expected = [prob[ids[word]].item() for word in COLOURS.answers]
    assert model.scores(["the sky"])[0] == pytest.approx(expected)


def test_blip2_reads_an_image(image_folder):
    model = ImageModel(image_folder, question=COLOURS)
    images = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    together = model.scores(images)
    assert together.shape == (2, 3)
    assert together[1] == pytest.approx(model.scores(images[1:])[0], abs=1e-6)
    assert (together[0] != together[1]).any()


def test_the_program_asks_both_models(image_folder, text_folder, tmp_path):
    raw, out = raw_layouts.mmsd(tmp_path / "raw"), str(tmp_path / "out")
    assert prepare_data.main(["mmsd", "--source", str(raw), "--output", out]) == 0
    words = ["--dataset", "mmsd", "--data_dir", out, "--output", str(tmp_path / "table")]
    words += ["--labeller", "transformers", "--use_cpu", "--batch_size", "4", "--splits", "test"]
    words += ["--answers", "red", "blue", "--question", "Is it blue?"]
    words += ["--model", text_folder, "--image_model", image_folder]
    assert prepare_data.main(["interactions", *words]) == 0
    table = InteractionTable.load(tmp_path / "table" / "interactions.parquet")
    question = Question("Is it blue?", ("red", "blue"))
    texts = [f"words of {number} # tag" for number in range(810, 814)]
    expected = TextModel(text_folder, question=question).scores(texts)
    expected /= expected.sum(-1, keepdims=True)
    assert table.probabilities["text"] == pytest.approx(expected, abs=1e-5)
    assert table.predictions["text"].tolist() == expected.argmax(-1).tolist()
    assert (table.code_N >= 0).all()


def test_answers_that_begin_alike_are_refused():
    with pytest.raises(ConfigError, match="begin with the same token"):
        answer_tokens(tokenizer(), ["photo", "photo book"])
    with pytest.raises(ConfigError, match="must be different words"):
        Question("?", ("Yes", "yes"))
    with pytest.raises(ConfigError, match=r"\{question\}, \{input\} and \{answers\}"):
        Question("?", ("Yes", "No"), "{text}")


def test_a_question_from_the_class_names():
    assert Question.of(("not_sarcastic", "sarcastic")).text == "Is this sarcastic?"
    assert Question.of(("not_sarcastic", "sarcastic")).answers == ("No", "Yes")
    assert Question.of(("a_b", "c", "d")).answers == ("a b", "c", "d")
    with pytest.raises(ConfigError, match="1 words, the data set 2 classes"):
        Question.of(("no", "yes"), answers=["yes"])


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(CheckpointError, match="no model of the kind AutoModelForCausalLM"):
        TextModel(str(tmp_path), question=COLOURS)
