"""Train the small CLIP's tokenizer on clip-art titles and keywords and on emoji names.

    python -m pretrain.recipes.make_tokenizer --data_dir DIR --output mm_moe/backbones/small_clip

`DIR` holds `openclipart/openclipart.parquet` and `emoji/emoji.parquet`. A few seconds; every
run gives the same result. Byte-level BPE: no text is out of vocabulary. Lower case, as in CLIP.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from transformers import PreTrainedTokenizerFast

from mm_moe.errors import DataError

BOS, EOS, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"  # ids 0, 1, 2: see SmallClipSettings
VOCAB_SIZE = 4096
MAX_TOKENS = 24


def captions(data_dir: Path) -> Iterator[str]:
    """Every title, keyword list and emoji name, in the order of the files."""
    for path, column in (
        (data_dir / "openclipart" / "openclipart.parquet", "title"),
        (data_dir / "emoji" / "emoji.parquet", "text"),
    ):
        if not path.is_file():
            raise DataError(f"no file {str(path)!r}; --data_dir must hold openclipart/ and emoji/.")
        table = pq.read_table(path, columns=[column, "keywords"])
        for row in table.to_pylist():
            yield row[column] or ""
            yield " ".join(row["keywords"] or []).replace("_", " ")


def train(texts: Iterator[str], *, vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that marks start and end and pads on the right."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 0), (EOS, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="right",
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    """Read, train, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    train(captions(arguments.data_dir)).save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
