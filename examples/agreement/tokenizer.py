"""A word tokenizer for the grammar: one token a word, with its leading space, as in GPT-2 but of whole words only.

`<bos>` is put before every text; `<eos>` ends a document in training; a word outside the grammar is `<unk>`.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from examples.agreement.lexicon import PUNCTUATION, vocabulary

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
SPACE = "Ġ"  # the byte-level alphabet's letter for a space


def build_tokenizer(*, max_length: int) -> PreTrainedTokenizerFast:
    """Make the tokenizer; `save_tokenizer` saves it."""
    words = [word if word in PUNCTUATION.split() else SPACE + word for word in vocabulary()]
    ids = {token: index for index, token in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", ids["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer's files under the class name that all versions of transformers know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2) + "\n")
