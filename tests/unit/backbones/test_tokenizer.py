"""The small CLIP's tokenizer: ids as the text tower expects, no text out of vocabulary."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mm_moe.backbones.clip_small import SMALL_CLIP_FOLDER, SmallClipSettings
from mm_moe.errors import DataError
from pretrain.recipes.make_tokenizer import captions, train


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SMALL_CLIP_FOLDER)


def test_special_ids_are_those_of_the_text_tower(tokenizer):
    text = SmallClipSettings().clip_config().text_config
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (0, 1, 2)
    assert len(tokenizer) <= text.vocab_size


def test_rows_start_end_and_pad_on_the_right(tokenizer):
    rows = tokenizer(["cat", "a very happy grinning face"], padding=True)
    short, long = rows["input_ids"]
    assert short[0] == long[0] == 0
    assert long[-1] == 1
    assert short[short.index(1) + 1 :] == [2] * (len(long) - short.index(1) - 1)
    assert rows["attention_mask"][0] == [1] * (short.index(1) + 1) + [0] * short.count(2)


def test_any_text_survives_in_lower_case(tokenizer):
    text = "Zürich 😀 漢字 #1"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text.lower()


def test_a_long_text_is_cut_but_keeps_its_end(tokenizer):
    ids = tokenizer("word " * 100, truncation=True)["input_ids"]
    assert len(ids) == SmallClipSettings().max_text_tokens
    assert ids[-1] == 1


def test_training_joins_frequent_pairs():
    tokenizer = train(iter(["banana band"] * 5), vocab_size=270)
    assert len(tokenizer("banana band")["input_ids"]) < 2 + len("banana band")
    assert len(tokenizer) <= 270


def test_missing_data_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"openclipart\.parquet"):
        next(captions(tmp_path))
