"""Small tokenizers of every family, trained on a few sentences; `</s>` can be appended as some models' own do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    'the boy want the dog. the boys want the dogs. "he said, "it is 1352, and 52!" she said: (he) they\'re 7 5 9',
    "the old man near the cars has a dog; the old men near the car have dogs because she was he walks walked 1301 17",
] * 4
NAMES = ("<unk>", "<s>", "</s>")


def _metaspace(scheme: str) -> Callable[[], Tokenizer]:
    def make() -> Tokenizer:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
        return _trained(tokenizer, trainers.BpeTrainer)

    return make


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), size=380)


def _llama() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # only while it is trained
    tokenizer = _trained(tokenizer, trainers.BpeTrainer)
    tokenizer.pre_tokenizer = None  # type: ignore[assignment]
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _trained(tokenizer, trainers.UnigramTrainer, unk_token="<unk>")


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))  # type: ignore[call-arg]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _trained(tokenizer, trainers.WordPieceTrainer)


def _word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))  # type: ignore[call-arg]
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _trained(tokenizer, trainers.WordLevelTrainer)


def _character() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))  # type: ignore[call-arg]
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _trained(tokenizer, trainers.WordLevelTrainer)


def _trained(tokenizer: Tokenizer, trainer: Any, *, size: int = 130, **options: Any) -> Tokenizer:
    settings = trainer(vocab_size=size, special_tokens=list(NAMES), show_progress=False, **options)
    tokenizer.train_from_iterator(SENTENCES, settings)
    return tokenizer


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": _byte_level,
    "llama": _llama,
    "metaspace-first": _metaspace("first"),
    "metaspace-always": _metaspace("always"),
    "metaspace-never": _metaspace("never"),
    "unigram": _unigram,
    "word-piece": _word_piece,
    "word-level": _word_level,
    "character": _character,
}


def family(name: str, template: str = "$A") -> PreTrainedTokenizerFast:
    """A tokenizer by family; template: which special tokens it adds by itself, such as `<s> $A </s>`."""
    tokenizer = FAMILIES[name]()
    added = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=added)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
