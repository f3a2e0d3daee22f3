"""Fine-tuning of finished autoencoders for the predictions of a model in which all of them stand at once.

Trained one by one, autoencoders minimise their own errors; spliced together those add up to a model that predicts much
worse. Braun et al. 2024 (arXiv 2405.12241) train on the KL divergence to the model's own predictions instead, with
the reconstruction of activations as a second term; Karvonen 2025 (arXiv 2503.17272) shows that a short stretch of it
at the end of ordinary training is enough, with both terms brought to the same size as they change. Here all sites stand
in the model together. A step, on a batch of text:

1. the model as it is: its predictions p, and x at every site;
2. the model with x̂ in place of x at all sites, each autoencoder reading what the ones before it left. The errors are
   dropped; special tokens keep their x. The prediction loss P is KL(p ‖ p spliced), or the cross-entropy of the text,
   in nats a token. Its gradient runs through the frozen model into all autoencoders, the early ones included;
3. R = mean over sites of ‖x − x̂‖² / (mean ‖x − x̄‖²), on the x of step 1, the activations features are read from;
4. loss = (R / P) P + w R with R / P as a constant: P and R pull with strengths 1 and w, whatever their units;
5. Adam; decoder rows stay unit vectors and L0 what it was (`sae.training.finetuning_sae`).

The new autoencoders are a run of their own; checkpoints are made at even distances, and on a CPU an interrupted run
goes on to the same bits.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from sae._progress import ProgressBar
from sae._run.locks import lock
from sae.autoencoder import SparseAutoencoder
from sae.data.activations import ContextStream
from sae.data.batches import counted_tokens
from sae.data.text import TextSource
from sae.errors import UserError
from sae.model.checks import check_finite
from sae.model.forward import with_gradients
from sae.model.hook_points import SiteEdit
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.model.tokens import Tokens
from sae.saes import SAEs, saes_fingerprint
from sae.splice import check_saes, spliced_predictions
from sae.training import checkpoint as checkpoints
from sae.training.checkpoint import Checkpoint
from sae.training.config import FinetuneConfig
from sae.training.divergence import all_finite, diverged, warn_of_useless
from sae.training.finetuning_sae import FinetuningSAE, Reconstruction, check_tunable
from sae.training.run_folder import RunFolder, run_settings
from sae.training.stopping import stopping
from sae.training.trainer import BETAS

log = logging.getLogger(__name__)

MEASURED_BATCHES = 32
"""Batches on which scale and L0 are measured beforehand; documents come sorted by length, so a few would not do."""

PREDICTED_TOKENS = 10_000
"""Tokens, the first of the text, on which predictions are measured before and after."""


class SplicedLoss(NamedTuple):
    """The loss of one batch and its parts."""

    loss: Tensor  # scalar, what is differentiated
    prediction: Tensor  # scalar, nats a token
    unexplained: dict[Site, Tensor]  # mean ‖x − x̂‖² over variance at each site
    reconstructions: dict[Site, Reconstruction]  # of the model's own x at the counted tokens


def spliced_loss(
    model: LanguageModel,
    tunables: Mapping[Site, FinetuningSAE],
    tokens: Tokens,
    counted: Tensor,
    config: FinetuneConfig,
) -> SplicedLoss:
    """The loss of a batch with x replaced at the counted tokens [B, S]; see the head of this file."""
    clean = model.run(tokens, capture=tunables)
    check_finite(clean)
    edits = {site: _splice(tunable, counted) for site, tunable in tunables.items()}
    logits = model.run(tokens, edits=edits, grad=True).logits
    prediction = prediction_loss(config.loss, logits, clean.logits, tokens)
    reconstructions, unexplained = {}, {}
    for site, tunable in tunables.items():
        x = clean.activations[site][counted]
        reconstructions[site] = tunable(x)
        unexplained[site] = (x - reconstructions[site].x_hat).square().sum() / (max(1, len(x)) * tunable.scale**2)
    mean = torch.stack(list(unexplained.values())).mean()
    balance = (mean / prediction.clamp(min=1e-12)).detach()
    return SplicedLoss(balance * prediction + config.reconstruction * mean, prediction, unexplained, reconstructions)


def prediction_loss(kind: str, logits: Tensor, model_logits: Tensor, tokens: Tokens) -> Tensor:
    """KL(model ‖ spliced) at every token, or cross-entropy of every next token: a mean in nats. Logits: [B, S, V]."""
    mask = tokens.attention_mask.bool()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if kind == "kl":
        log_q, log_p = (x[mask].to(logits).log_softmax(-1) for x in (logits, model_logits))
        return kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    scored = mask[:, :-1] & mask[:, 1:]
    return cross_entropy(logits[:, :-1][scored], tokens.input_ids[:, 1:][scored])


def _splice(tunable: FinetuningSAE, counted: Tensor) -> SiteEdit:
    return lambda x: x.masked_scatter(counted[..., None], tunable(x[counted]).x_hat.to(x.dtype))


@with_gradients
def finetune_saes(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    texts: str | Path | Iterable[str] | TextSource,
    *,
    out: str | Path,
    config: FinetuneConfig | None = None,
    origin: str = "",
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> SAEs:
    """Fine-tune the autoencoders of a model together, spliced in, so that it predicts well with all of them.

    Args:
        model: the model they read.
        saes: the autoencoders to begin with, by site; they stay as they are.
        texts: documents, a .txt or .jsonl file, or a hub data set.
        out: the new run folder: autoencoders go to `out`/saes/<site>, the log to `out`/saes/finetuning.jsonl.
        config: length and rates; see `FinetuneConfig`, whose defaults the command has too.
        origin: where the given ones came from: a run is not resumed with others.
        resume: go on from the last checkpoint of an interrupted run with the same options.
        overwrite: replace an earlier run in that folder.
        progress: whether to show a bar on standard error.

    Returns:
        New autoencoders by site, in the order of the forward pass.

    Raises:
        UserError: an autoencoder does not fit the model or cannot be tuned, or the folder holds something else.
    """
    config, out, source = config or FinetuneConfig(), Path(out), TextSource.of(texts)
    check_saes(model, saes)
    saes = dict(sorted(saes.items()))
    for sae in saes.values():
        check_tunable(sae)
    options = {"config": {"saes": origin, **asdict(config)}, "saes_fingerprint": saes_fingerprint(saes)}
    run = RunFolder(out, "finetune", run_settings(model, source, list(saes), {}) | options)
    folders = {site: out / "saes" / site.name for site in saes}
    with lock(out):
        if resume and run.finished():
            log.info("the run in %s is complete; nothing to resume", out)
            return SAEs({site: SparseAutoencoder.load(folders[site], device=model.device) for site in saes})
        stream = ContextStream(
            model, source, context_length=config.context_length, packed=config.packed, forward_tokens=config.batch
        )
        tunables = make_tunable(model, saes, stream, config)
        measured = partial(_predictions, model, source, config)
        before = measured(saes)
        run.start(resume=resume, overwrite=overwrite)
        log_path = out / "saes" / "finetuning.jsonl"
        Finetuner(
            model, tunables, stream, config, log_path=log_path, checkpoint_folder=run.checkpoints, progress=progress
        ).run()
        tuned = {}
        for site, tunable in tunables.items():
            tuned[site] = tunable.export()
            tuned[site].config = replace(
                tunable.config,
                site=site.name,
                model=model.name,
                model_fingerprint=model.fingerprint,
                extra={**tunable.config.extra, "finetuning": asdict(config)},
            )
            tuned[site].save(folders[site])
        run.finish(before=before, after=measured(tuned))
    return SAEs(tuned)


def _predictions(
    model: LanguageModel, source: TextSource, config: FinetuneConfig, saes: Mapping[Site, SparseAutoencoder]
) -> dict[str, float]:
    """What `spliced_predictions` says of the beginning of the text."""
    tokens = min(config.tokens, PREDICTED_TOKENS)
    return spliced_predictions(model, saes, source.read(), max_tokens=tokens, context=config.context_length)


def make_tunable(
    model: LanguageModel, saes: Mapping[Site, SparseAutoencoder], stream: ContextStream, config: FinetuneConfig
) -> dict[Site, FinetuningSAE]:
    """Trainable autoencoders with scale and L0 measured on the first batches; the text is then where it was."""
    start, n = stream.state, 0
    sums = {site: [torch.zeros((), device=model.device) for _ in range(3)] for site in saes}
    for _ in range(MEASURED_BATCHES):
        tokens = stream.take().to(model.device)
        counted = counted_tokens(model, tokens, special_tokens=not config.exclude_special)
        n += int(counted.sum())
        for site, x in model.run(tokens, capture=saes, need_logits=False).activations.items():
            x = x[counted].to(saes[site].W_dec.dtype)
            more = (x.sum(0), x.square().sum(), len(saes[site].encode_sparse(x).value))
            sums[site] = [total + part for total, part in zip(sums[site], more, strict=True)]
    stream.seek(start)
    if not n:
        raise UserError(f"the text {stream.source.name!r} begins with nothing but special tokens")
    tunables = {}
    for site, sae in saes.items():
        total, squares, n_active = sums[site]
        variance = (squares - total.square().sum() / n) / n
        tunables[site] = FinetuningSAE(sae, scale=variance.clamp(min=1e-12).sqrt().item(), l0=n_active.item() / n)
    return tunables


class Finetuner:
    """Tunable autoencoders, the text they read, the optimizer that moves them, and where they are in the run."""

    def __init__(
        self, model: LanguageModel, tunables: Mapping[Site, FinetuningSAE], stream: ContextStream,
        config: FinetuneConfig, *, log_path: Path, checkpoint_folder: Path, progress: bool,
    ):  # fmt: skip
        self.model, self.tunables, self.stream, self.config = model, dict(tunables), stream, config
        self.log_path, self.checkpoint_folder, self.progress = log_path, checkpoint_folder, progress
        self.optimizer = torch.optim.Adam(
            [{"params": list(tunable.weights.values())} for tunable in tunables.values()],
            betas=BETAS,
            fused=model.device.type in ("cpu", "cuda"),
        )
        self.step = self.tokens = 0
        zero = torch.zeros((), device=model.device)
        names = ("prediction", *(f"{kind}/{site}" for site in tunables for kind in ("unexplained", "active")))
        self.sums = {name: zero.clone() for name in names}  # since the last line of the log
        self.logged_tokens = 0
        self.explained: dict[str, float] = {}  # by site, since the last line of the log

    def run(self) -> None:
        """Fine-tunes to the end, from the last checkpoint if there is one."""
        self._restore()
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        config, total = self.config, self.config.tokens
        bar = ProgressBar(total=total, initial=self.tokens, unit="token", desc="fine-tune", disable=not self.progress)
        try:
            with bar, self.log_path.open("a", encoding="utf-8") as lines, stopping() as stop:
                while self.tokens < total:
                    before = self.tokens
                    self._one_step()
                    bar.update(min(self.tokens, total) - before)
                    if self.step % config.log_steps == 0 or self.tokens >= total:
                        bar.set_postfix_str(self._log(lines))
                    if stop or self._checkpoints_at(before) < self._checkpoints_at(self.tokens):
                        lines.flush()
                        self._save()
                    if stop and self.tokens < total:
                        raise KeyboardInterrupt
            self._check_weights()
            warn_of_useless(self.explained)
        except KeyboardInterrupt:
            log.warning("interrupted after %d of %d tokens; the last checkpoint stands", self.tokens, total)
            raise

    def _check_weights(self) -> None:
        """`UserError` where a weight is not finite: such an autoencoder is neither saved nor exported."""
        for site, tunable in self.tunables.items():
            tensors = (*tunable.weights.values(), *tunable.state.values())
            if not all_finite(tensor.detach() for tensor in tensors):
                raise diverged(site.name, self.step, self.checkpoint_folder)

    def _checkpoints_at(self, tokens: int) -> int:
        """How many checkpoints are due once so many tokens are read."""
        return min(tokens, self.config.tokens) * self.config.checkpoints // self.config.tokens

    def _one_step(self) -> None:
        tokens = self.stream.take().to(self.model.device)
        counted = counted_tokens(self.model, tokens, special_tokens=not self.config.exclude_special)
        losses = spliced_loss(self.model, self.tunables, tokens, counted, self.config)
        if not losses.loss.isfinite():
            sites = [site.name for site, value in losses.unexplained.items() if not value.isfinite()]
            raise diverged(sites[0] if sites else "all sites together", self.step, self.checkpoint_folder)
        losses.loss.backward()
        n_tokens = int(counted.sum())
        self.tokens, self.step = self.tokens + n_tokens, self.step + 1
        for (site, tunable), group in zip(self.tunables.items(), self.optimizer.param_groups, strict=True):
            group["lr"] = self.config.learning_rate_at(self.tokens / self.config.tokens, tunable.config.d_model)
            tunable.project()
            tunable.steer(losses.reconstructions[site].code)
            self.sums[f"unexplained/{site}"] += losses.unexplained[site].detach() * n_tokens
            self.sums[f"active/{site}"] += losses.reconstructions[site].n_active
        self.sums["prediction"] += losses.prediction.detach() * n_tokens
        self.optimizer.step()
        self.optimizer.zero_grad()
        for tunable in self.tunables.values():
            tunable.constrain()

    def _log(self, lines: TextIO) -> str:
        """Writes a line a site and returns the means for the bar."""
        n = max(1, self.tokens - self.logged_tokens)
        means = {name: total.item() / n for name, total in self.sums.items()}
        for site, group in zip(self.tunables, self.optimizer.param_groups, strict=True):
            line = {"step": self.step, "tokens": self.tokens, "site": site.name, self.config.loss: means["prediction"]}
            line |= {"explained_variance": 1 - means[f"unexplained/{site}"], "l0": means[f"active/{site}"]}
            lines.write(json.dumps(line | {"learning_rate": group["lr"]}) + "\n")
        self.explained = {site.name: 1 - means[f"unexplained/{site}"] for site in self.tunables}
        for total in self.sums.values():
            total.zero_()
        self.logged_tokens = self.tokens
        explained = 1 - sum(means[f"unexplained/{site}"] for site in self.tunables) / len(self.tunables)
        active = sum(means[f"active/{site}"] for site in self.tunables) / len(self.tunables)
        return f"{self.config.loss} {means['prediction']:.3f}, explained {explained:.3f}, L0 {active:.1f}"

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that changes in fine-tuning, by name; the tensors themselves, not copies."""
        tensors = {f"sums/{name}": total for name, total in self.sums.items()}
        for site, tunable in self.tunables.items():
            tensors |= checkpoints.tensors_of(site.name, tunable.weights, tunable.state, self.optimizer)
        return tensors

    def _save(self) -> None:
        self._check_weights()
        done = {"done": torch.tensor([self.tokens, self.logged_tokens])}
        size = self.log_path.stat().st_size
        state = Checkpoint(self.step, 0, 0, self.stream.state, size, self._tensors() | done)
        checkpoints.save(self.checkpoint_folder, state)

    def _restore(self) -> None:
        """Puts the last checkpoint in force, if there is one."""
        found = checkpoints.latest(self.checkpoint_folder)
        if found is None:
            self.log_path.unlink(missing_ok=True)
            return
        self.step = found.step
        self.tokens, self.logged_tokens = found.tensors["done"].tolist()
        self.stream.seek(found.position)
        for site, tunable in self.tunables.items():
            checkpoints.make_moments(site.name, tunable.weights, self.optimizer, found.tensors)
        with torch.no_grad():
            checkpoints.put_in_force(self._tensors(), found, self.checkpoint_folder)
        checkpoints.cut_log(self.log_path, found.log_bytes)
        log.info("resumed after %d of %d tokens", self.tokens, self.config.tokens)
