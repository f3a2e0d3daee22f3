"""Texts to padded batches and back to readable strings, for each kind of tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sae.errors import UserError
from sae.model.tokens import TokenizerWrapper, Tokens
from tests.conftest import word_tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE as in GPT-2: a leading space is part of a token and written Ġ."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("Ġ", "he"), ("s", "he"), ("Ġ", "she")]
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """BPE as in Llama: words start with ▁, and text gets one in front."""
    letters = list("▁abehs")
    merges = [("h", "e"), ("▁", "he"), ("s", "he"), ("▁", "she")]
    vocabulary = {token: i for i, token in enumerate(["<unk>", *letters, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_padding_is_on_the_left_and_the_tokenizer_stays_as_it_was() -> None:
    tokenizer = word_tokenizer(unk_token="<unk>", eos_token="<eos>")
    coder = TokenizerWrapper(tokenizer)
    tokens = coder.encode(["the man runs", "she"])
    assert tokens.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert tokens.lengths.tolist() == [3, 1] and tokens.n_positions == 3 and len(tokens) == 2
    assert tokens.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert tokens.input_ids[1, -1] == tokenizer.convert_tokens_to_ids("she")
    assert tokenizer.pad_token is None and coder.tokenizer is not tokenizer
    assert coder.encode(["the man runs"], max_length=2).lengths.tolist() == [2]


def test_rows_and_copies() -> None:
    tokens = Tokens.from_rows([[5, 6, 7], [8], [9, 10]])
    assert tokens[1].input_ids.tolist() == [[0, 0, 8]]
    assert tokens[-1].input_ids.tolist() == tokens[2:].input_ids.tolist() == [[0, 9, 10]]
    assert tokens[torch.tensor([2, 0])].lengths.tolist() == [2, 3]
    assert tokens[tokens.lengths > 1].input_ids.tolist() == [[5, 6, 7], [0, 9, 10]]
    copies = tokens.repeat(2)
    assert all(torch.equal(copies.input_ids[c * 3 + r], tokens.input_ids[r]) for c in range(2) for r in range(3))


def test_texts_without_tokens() -> None:
    coder = TokenizerWrapper(word_tokenizer())
    with pytest.raises(UserError, match="text 1 has no tokens"):
        coder.encode(["he", ""])
    with pytest.raises(UserError, match="no texts"):
        coder.encode([])
    assert coder.prompt_ids([]) == coder.prompt_offsets([]) == []


@pytest.mark.parametrize("tokenizer", [word_tokenizer(), byte_tokenizer(), sentencepiece_tokenizer()])
def test_a_continuation_is_one_token_and_reads_with_its_space(tokenizer: PreTrainedTokenizerFast) -> None:
    coder = TokenizerWrapper(tokenizer)
    (added,) = coder.continuations(["a he"], [" she"])
    assert added is not None and len(added) == 1
    assert coder.strings(added) == [" she"]
    assert coder.encode(["a she"]).input_ids[0, -1] == added[0]
    assert coder.continuations(["a"], [""]) == [[]]


def test_bytes_of_a_split_character_stay_readable() -> None:
    coder = TokenizerWrapper(byte_tokenizer())
    ids = coder.encode(["☃"]).input_ids[0]
    assert len(ids) == 3 and "\ufffd" not in "".join(coder.strings(ids))
    assert coder.strings(torch.tensor([0])) == ["<|endoftext|>"]


def test_sentencepiece_tokenizer_of_a_trained_model(shared_dir: Path) -> None:
    coder = TokenizerWrapper(AutoTokenizer.from_pretrained(shared_dir / "models" / "tinystories-260k"))
    tokens = coder.encode(["Once upon a time she", "he"])
    assert coder.strings(tokens.input_ids[0]) == ["<s>", " Once", " upon", " a", " time", " she"]
    she, he = coder.continuations(["a", "a"], [" she", " he"])
    assert tokens.input_ids[:, -1:].tolist() == [she, he] and tokens.lengths.tolist() == [6, 2]


def test_text_that_is_no_unicode_is_told_in_a_sentence() -> None:
    coder = TokenizerWrapper(word_tokenizer())
    for read in (coder.encode, coder.prompt_ids, coder.prompt_offsets):
        with pytest.raises(UserError, match="text 1 is no text"):
            read(["he", "a\ud800b"])
