"""Trains the bundled model on the grammar's own stream of documents: `python -m examples.agreement.train_model`.

1. Documents are generated as they are needed; a row is one document, `<bos>` first and `<eos>` last, so that a prompt
   looks to the model like the beginning of a document.
2. A pool of documents is sorted by length and cut into batches of about equally many tokens.
3. AdamW with warm-up and linear decay on the next-token loss, on one thread: that gives the same weights every time on
   one kind of machine, and matrices this small gain nothing from more.
4. The loss on fresh documents is reported beside the entropy of the grammar.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from torch.nn import functional as F
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from examples.agreement import MODEL
from examples.agreement.grammar import documents, entropy
from examples.agreement.tokenizer import build_tokenizer, save_tokenizer

log = logging.getLogger(__name__)
VALID_SEED = 20_000_003


@dataclass(frozen=True)
class TrainConfig:
    """How the bundled model is made; the defaults made it."""

    out: Path = MODEL
    """folder to write"""
    layers: int = 4
    """transformer blocks"""
    width: int = 128
    """residual stream"""
    heads: int = 4
    """attention heads"""
    steps: int = 1600
    """optimizer steps"""
    batch_tokens: int = 2500
    """tokens a step, about"""
    learning_rate: float = 3e-3
    """peak, after the warm-up"""
    warmup: int = 100
    """steps of linear warm-up"""
    weight_decay: float = 0.01
    """on matrices"""
    pool: int = 8192
    """documents sorted by length at a time"""
    seed: int = 0
    """of the weights and of the documents"""


def batches(tokenizer: PreTrainedTokenizerFast, config: TrainConfig) -> Iterator[torch.Tensor]:
    """Right-padded documents [B, S] without end, from seed `config.seed` on."""
    shuffler = random.Random(config.seed)
    pad = tokenizer.pad_token_id
    round_seed = config.seed
    while True:
        round_seed += 1
        rows = sorted(encode(tokenizer, list(documents(config.pool, seed=round_seed))), key=len)
        groups: list[list[list[int]]] = [[]]
        for row in rows:
            if len(row) * (len(groups[-1]) + 1) > config.batch_tokens:
                groups.append([])
            groups[-1].append(row)
        shuffler.shuffle(groups)
        for group in groups:
            yield padded(group, pad)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]


def padded(rows: list[list[int]], pad: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])


def summed_loss(model: GPTNeoXForCausalLM, rows: torch.Tensor, pad: int) -> tuple[torch.Tensor, int]:
    """Next-token loss summed over the real tokens, and their number; padding on the right is never attended to."""
    logits = model(input_ids=rows).logits[:, :-1]
    targets = rows[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=pad, reduction="sum")
    return loss, int((targets != pad).sum())


@torch.no_grad()
def valid_loss(model: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int = 2000) -> tuple[float, float]:
    """Nats a token of the model, and of the grammar's derivation, on documents the model has not been trained on."""
    model.eval()
    pad = tokenizer.pad_token_id
    rows = sorted(encode(tokenizer, list(documents(count, seed=VALID_SEED))), key=len)
    total, tokens = 0.0, 0
    for start in range(0, len(rows), 100):
        loss, real = summed_loss(model, padded(rows[start : start + 100], pad), pad)
        total, tokens = total + loss.item(), tokens + real
    model.train()
    return total / tokens, entropy(count, seed=VALID_SEED) * count / tokens


def new_model(tokenizer: PreTrainedTokenizerFast, config: TrainConfig) -> GPTNeoXForCausalLM:
    torch.manual_seed(config.seed)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.width,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(config: TrainConfig) -> dict[str, float]:
    """Trains and saves the model and its tokenizer; returns what training measured."""
    torch.set_num_threads(1)
    tokenizer = build_tokenizer(max_length=256)
    model = new_model(tokenizer, config)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / config.warmup, (config.steps - step) / (config.steps - config.warmup))
    )
    start, cpu_start = time.perf_counter(), time.process_time()
    seen, total, tokens = 0, 0.0, 0
    for step, rows in zip(range(1, config.steps + 1), batches(tokenizer, config), strict=False):
        loss, real = summed_loss(model, rows, tokenizer.pad_token_id)
        optimizer.zero_grad()
        (loss / real).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total, tokens, seen = total + loss.item(), tokens + real, seen + real
        if step % 100 == 0:
            speed = seen / (time.perf_counter() - start)
            log.info("step %d  loss %.4f  %.1fM tokens  %.0f tokens/s", step, total / tokens, seen / 1e6, speed)
            total, tokens = 0.0, 0
    loss_valid, nats = valid_loss(model, tokenizer)
    model.save_pretrained(config.out)
    save_tokenizer(tokenizer, config.out)
    return {
        "loss": loss_valid,
        "grammar_entropy": nats,
        "tokens": seen,
        "cpu_minutes": (time.process_time() - cpu_start) / 60,
        "wall_minutes": (time.perf_counter() - start) / 60,
    }


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = tyro.cli(TrainConfig, description=__doc__)
    measured = train(config)
    settings = {name: value for name, value in asdict(config).items() if name != "out"}
    record = {**settings, "torch": torch.__version__, **measured}
    (config.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    log.info("%s", json.dumps(measured))


if __name__ == "__main__":
    main()
