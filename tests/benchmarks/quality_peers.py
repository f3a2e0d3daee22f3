"""Trains autoencoders with another package's own trainer; run by that package's interpreter, imports nothing of ours.

    PEER_PYTHON quality_peers.py  (paths of job files on standard input, a line each; answers `done` to each)

A job names peer, architecture, a safetensors file with rows `x` [N, d], features, k, batch, steps, seed, coefficient
(what steers L0 where a penalty does), a factor on the learning rate, and the folder to write to, in the peer's own file
format. Everything else is the package's default; where it has none, or leaves it to the user, its own demo's value:

- dictionary_learning: learning rates as its trainers pick them; its demo's normalised activations, learning-rate decay
  over the last fifth and Matryoshka groups. Its warm-ups (1,000 and 2,000 steps) and the step from which BatchTopK's
  threshold is followed (1,000) are cut to a tenth of the run where they would be longer.
- sae_lens: `SAETrainerConfig`'s learning rate 3e-4; its documentation's scaled activations
  (`expected_average_only_in`), learning-rate decay over the last fifth, L1 warm-up over a twentieth, and recommended
  JumpReLU (tanh loss); dictionary_learning's Matryoshka groups, for it has none.
- sparsify: its `Trainer` on a model that looks rows up by their number, so that optimizer (signum, schedule-free),
  learning rate and initialisation are its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

Job = dict[str, Any]
GROUPS = (1 / 32, 1 / 16, 1 / 8, 1 / 4)
"""Shares of the features in the groups of a Matryoshka dictionary before the last, from dictionary_learning's demo."""


def batches(x: Tensor, batch: int) -> Iterator[Tensor]:
    """Consecutive batches of rows, from the beginning again after the last."""
    for step in count():
        start = step * batch % (len(x) - len(x) % batch)
        yield x[start : start + batch].clone()


def matryoshka_groups(features: int) -> list[int]:
    """Sizes of the groups."""
    sizes = [round(share * features) for share in GROUPS]
    return [*sizes, features - sum(sizes)]


def dictionary_learning(job: Job, x: Tensor) -> None:
    from dictionary_learning import trainers
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.training import trainSAE

    steps, short = job["steps"], max(1, job["steps"] // 10)
    config = {
        "steps": steps, "activation_dim": x.shape[1], "dict_size": job["features"], "layer": 0, "lm_name": "none",
        "seed": job["seed"], "device": "cpu", "warmup_steps": min(1000, short), "decay_start": int(0.8 * steps),
    }  # fmt: skip
    fixed_k = {"k": job["k"], "threshold_start_step": min(1000, short)}
    penalty = {"sparsity_warmup_steps": min(2000, short)}
    trainer, rate, own = {
        "topk": (trainers.TopKTrainer, None, fixed_k),
        "batchtopk": (trainers.BatchTopKTrainer, None, fixed_k),
        "matryoshka": (
            MatryoshkaBatchTopKTrainer,
            None,
            fixed_k | {"group_fractions": [n / job["features"] for n in matryoshka_groups(job["features"])]},
        ),
        "relu": (trainers.StandardTrainer, 1e-3, penalty | {"l1_penalty": job["coefficient"]}),
        "gated": (trainers.GatedSAETrainer, 5e-5, penalty | {"l1_penalty": job["coefficient"]}),
        "jumprelu": (trainers.JumpReluTrainer, 7e-5, penalty | {"target_l0": job["coefficient"]}),
    }[job["architecture"]]
    rate = rate or 2e-4 / (job["features"] / 2**14) ** 0.5  # what the trainers choose if given none
    config |= own | {"trainer": trainer, "lr": rate * job["rate"]}
    torch.manual_seed(job["seed"])  # not every trainer uses the seed it is given
    trainSAE(
        batches(x, job["batch"]), [config], steps, save_dir=job["out"], normalize_activations=True, device="cpu"
    )  # fmt: skip


def sae_lens(job: Job, x: Tensor) -> None:
    import sae_lens
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    steps, features = job["steps"], job["features"]
    widths = torch.tensor(matryoshka_groups(features)).cumsum(0).tolist()
    name, own = {
        "topk": ("TopK", {"k": job["k"]}),
        "batchtopk": ("BatchTopK", {"k": job["k"]}),
        "matryoshka": ("MatryoshkaBatchTopK", {"k": job["k"], "matryoshka_widths": widths}),
        "relu": ("Standard", {"l1_coefficient": job["coefficient"], "l1_warm_up_steps": steps // 20}),
        "gated": ("Gated", {"l1_coefficient": job["coefficient"], "l1_warm_up_steps": steps // 20}),
        "jumprelu": (
            "JumpReLU",
            {
                "l0_coefficient": job["coefficient"], "l0_warm_up_steps": steps, "jumprelu_bandwidth": 2.0,
                "jumprelu_sparsity_loss_mode": "tanh", "jumprelu_init_threshold": 0.1, "pre_act_loss_coefficient": 3e-6,
            },
        ),
    }[job["architecture"]]  # fmt: skip
    torch.manual_seed(job["seed"])
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(
        d_in=x.shape[1], d_sae=features, normalize_activations="expected_average_only_in", **own
    )
    sae = getattr(sae_lens, f"{name}TrainingSAE")(config)
    trainer_config = SAETrainerConfig(
        total_training_samples=steps * job["batch"], train_batch_size_samples=job["batch"], lr=3e-4 * job["rate"],
        lr_end=3e-5 * job["rate"],
        lr_decay_steps=steps // 5, n_batches_for_norm_estimate=min(1000, len(x) // job["batch"]),
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    SAETrainer(trainer_config, sae, batches(x, job["batch"])).fit()
    sae.save_inference_model(job["out"])


class Lookup(nn.Module):
    """A model whose one layer gives row i of a table for the token i."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.table, self.device = table, table.device
        self.site = nn.Identity()
        self.dummy_inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.int64)}

    @property
    def base_model(self) -> Lookup:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.site(self.table[input_ids])


def sparsify(job: Job, x: Tensor) -> None:
    from datasets import Dataset
    from sparsify import SaeConfig, TrainConfig, Trainer

    numbers = torch.arange(job["steps"] * job["batch"]).remainder(len(x)).view(job["steps"], job["batch"])
    rows = Dataset.from_dict({"input_ids": numbers.numpy()}).with_format("torch")
    rate = None if job["rate"] == 1 else 5e-3 / (job["features"] / 2**14) ** 0.5 * job["rate"]
    config = TrainConfig(
        SaeConfig(num_latents=job["features"], k=job["k"]), batch_size=1, hookpoints=["site"], lr=rate,
        init_seeds=[job["seed"]], log_to_wandb=False, save_dir=job["out"], run_name="run", save_every=10**9,
    )  # fmt: skip
    Trainer(config, rows, Lookup(x)).fit()


PEERS: dict[str, Callable[[Job, Tensor], None]] = {
    "dictionary_learning": dictionary_learning,
    "sae_lens": sae_lens,
    "sparsify": sparsify,
}


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # packages print what they do
    for line in sys.stdin:
        job = json.loads(Path(line.strip()).read_text())
        torch.set_num_threads(job["threads"])
        PEERS[job["peer"]](job, load_file(job["rows"])["x"])
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main()
