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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal, NamedTuple, TextIO

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from sae._run.locks import lock
from sae.autoencoder import SparseAutoencoder
from sae.data.activations import ContextStream
from sae.data.batches import counted_tokens
from sae.data.text import TextSource
from sae.errors import UserError
from sae.model.forward import with_gradients
from sae.model.hook_points import SiteEdit, with_read
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.model.tokens import Tokens
from sae.saes import SAEs, as_saes, saes_fingerprint
from sae.splice import ensure_checked, spliced_predictions
from sae.training.config import FinetuneConfig
from sae.training.finetuning_sae import FinetuningSAE, Reconstruction, check_trainable
from sae.training.loop import BETAS, TrainingLoop, diverged
from sae.training.run_folder import RunFolder, run_settings

log = logging.getLogger(__name__)

MEASURED_BATCHES = 32
"""Batches on which scale and L0 are measured beforehand; documents come sorted by length, so a few would not do."""


PREDICTED_TOKENS = 10_000
"""Tokens, the first of the text, on which predictions are measured before and after."""


class SplicedLoss(NamedTuple):
    """The loss of one batch, and the terms it is made of."""

    loss: Tensor  # scalar, what is differentiated
    prediction: Tensor  # scalar, nats a token
    unexplained: dict[Site, Tensor]  # mean ‖x − x̂‖² over variance at each site
    reconstructions: dict[Site, Reconstruction]  # of the model's own x at the counted tokens


def spliced_loss(
    model: LanguageModel,
    saes: Mapping[Site, FinetuningSAE],
    tokens: Tokens,
    counted: Tensor,
    config: FinetuneConfig,
) -> SplicedLoss:
    """The loss of a batch with x replaced at the counted tokens [B, S]; see the head of this file."""
    reads = {site: sae.config.read_site(site) for site, sae in saes.items()}
    clean = model.run(tokens, capture={*reads, *reads.values()})
    clean.check_finite()
    edits: dict[Site, SiteEdit] = {}
    for site, sae in saes.items():
        edits |= with_read(site, reads[site], _splice(sae, counted))
    logits = model.run(tokens, edits=edits, grad=True).logits
    prediction = prediction_loss(config.loss, logits, clean.logits, tokens)
    reconstructions, unexplained = {}, {}
    for site, sae in saes.items():
        x = clean.activations[site][counted]
        reconstructions[site] = sae(clean.activations[reads[site]][counted])
        unexplained[site] = (x - reconstructions[site].x_hat).square().sum() / (max(1, len(x)) * sae.scale**2)
    mean = torch.stack(list(unexplained.values())).mean()
    balance = (mean / prediction.clamp(min=1e-12)).detach()
    return SplicedLoss(balance * prediction + config.reconstruction * mean, prediction, unexplained, reconstructions)


def prediction_loss(kind: Literal["kl", "ce"], logits: Tensor, model_logits: Tensor, tokens: Tokens) -> Tensor:
    """KL(model ‖ spliced) at every token, or cross-entropy of every next token: a mean in nats. Logits: [B, S, V]."""
    mask = tokens.attention_mask.bool()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if kind == "kl":
        log_q, log_p = (x[mask].to(logits).log_softmax(-1) for x in (logits, model_logits))
        return kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    scored = mask[:, :-1] & mask[:, 1:]
    return cross_entropy(logits[:, :-1][scored], tokens.input_ids[:, 1:][scored])


def _splice(sae: FinetuningSAE, counted: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, x_read: x.masked_scatter(counted[..., None], sae(x_read[counted]).x_hat.to(x.dtype))


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
        resume, overwrite: go on with an interrupted run of the same options, or replace an earlier run in `out`.
        progress: whether to show a bar on standard error.

    Returns:
        New autoencoders by site, in the order of the forward pass.

    Raises:
        UserError: an autoencoder does not fit the model or cannot be tuned, or the folder holds something else.
    """
    config, out, source = config or FinetuneConfig(), Path(out), TextSource.of(texts)
    ensure_checked(model, saes)
    saes = dict(sorted(saes.items()))
    check_trainable(saes.values())
    options = {"config": {"saes": origin, **asdict(config)}, "saes_fingerprint": saes_fingerprint(saes)}
    run = RunFolder(out, "finetune", run_settings(model, source, list(saes), {}) | options)
    with lock(out):
        if resume and run.finished():
            return run.load(model.device)
        stream = ContextStream(
            model, source, context_length=config.context_length, packed=config.packed, forward_tokens=config.batch
        )
        trainable = make_trainable(model, saes, stream, config)
        before = _predictions(model, saes, source, config)
        run.start(resume=resume, overwrite=overwrite)
        Finetuner(model, trainable, stream, config, run, progress=progress).run()
        tuned = SAEs({site: export(sae, site, model, config) for site, sae in trainable.items()})
        run.save(tuned)
        run.finish(before=before, after=_predictions(model, tuned, source, config))
    return tuned


def _predictions(
    model: LanguageModel, saes: Mapping[Site, SparseAutoencoder], source: TextSource, config: FinetuneConfig
) -> dict[str, float]:
    """Cross-entropy and divergence on the beginning of the text, with all autoencoders spliced in."""
    tokens = min(config.tokens, PREDICTED_TOKENS)
    return spliced_predictions(model, saes, source.read(), max_tokens=tokens, context=config.context_length)


def export(sae: FinetuningSAE, site: Site, model: LanguageModel, config: FinetuneConfig) -> SparseAutoencoder:
    """The fine-tuned autoencoder, with the options of fine-tuning in its config."""
    tuned = sae.export()
    extra = {**tuned.config.extra, "finetuning": asdict(config)}
    tuned.config = replace(
        tuned.config, site=site.name, model=model.name, model_fingerprint=model.fingerprint, extra=extra
    )
    return tuned


def make_trainable(
    model: LanguageModel, saes: Mapping[Site, SparseAutoencoder], stream: ContextStream, config: FinetuneConfig
) -> dict[Site, FinetuningSAE]:
    """Trainable autoencoders with scale and L0 measured on the first batches; the text is then where it was."""
    start, n = stream.state, 0
    reads = as_saes(saes).read_sites(saes)
    sums = {where: [torch.zeros((), device=model.device) for _ in range(2)] for where in {*reads, *reads.values()}}
    n_active = dict.fromkeys(saes, 0)
    for _ in range(MEASURED_BATCHES):
        tokens = stream.take().to(model.device)
        counted = counted_tokens(model, tokens, special_tokens=not config.exclude_special)
        n += int(counted.sum())
        run = model.run(tokens, capture=sums, need_logits=False)
        for where, (total, squares) in sums.items():
            x = run.activations[where][counted].float()
            sums[where] = [total + x.sum(0), squares + x.square().sum()]
        for site, read in reads.items():
            n_active[site] += len(saes[site].encode_sparse(run.activations[read][counted].float()).value)
    stream.seek(start)
    if not n:
        raise UserError(f"the text {stream.source.name!r} begins with nothing but special tokens")
    scales = {
        where: ((squares - total.square().sum() / n) / n).clamp(min=1e-12).sqrt().item()
        for where, (total, squares) in sums.items()
    }
    return {
        site: FinetuningSAE(sae, scale=scales[site], l0=n_active[site] / n, read_scale=scales[reads[site]])
        for site, sae in saes.items()
    }


class Finetuner(TrainingLoop):
    """Fine-tunes autoencoders that stand in the model together."""

    unit, title, counters = "token", "fine-tune", ("tokens", "logged_tokens")

    def __init__(
        self,
        model: LanguageModel,
        saes: Mapping[Site, FinetuningSAE],
        stream: ContextStream,
        config: FinetuneConfig,
        run: RunFolder,
        *,
        progress: bool,
    ):
        self.model, self.saes, self.stream, self.config = model, dict(saes), stream, config
        groups = [{"params": list(sae.weights.values())} for sae in saes.values()]
        optimizer = torch.optim.Adam(groups, betas=BETAS, fused=model.device.type in ("cpu", "cuda"))
        super().__init__({site.name: sae for site, sae in saes.items()}, optimizer, config, run, progress=progress)
        self.total, self.tokens, self.logged_tokens = config.tokens, 0, 0
        names = ("prediction", *(f"{kind}/{site}" for site in saes for kind in ("unexplained", "active")))
        self.sums = {name: torch.zeros((), device=model.device) for name in names}  # since the last line of the log

    @property
    def done(self) -> int:
        return self.tokens

    def run(self) -> None:
        """Fine-tunes to the end, from the last checkpoint if there is one."""
        if self._restore():
            self.stream.seek(self.position)
        self._run_loop()

    def _one_step(self) -> None:
        tokens, counted = self._next_batch()
        losses = spliced_loss(self.model, self.saes, tokens, counted, self.config)
        if not losses.loss.isfinite():
            sites = [site.name for site, value in losses.unexplained.items() if not value.isfinite()]
            raise diverged(sites[0] if sites else "all sites together", self.step, self.files.checkpoints)
        losses.loss.backward()
        n_tokens = int(counted.sum())
        self.tokens, self.step, self.position = self.tokens + n_tokens, self.step + 1, self.stream.state
        for (site, sae), group in zip(self.saes.items(), self.optimizer.param_groups, strict=True):
            group["lr"] = self.config.learning_rate_at(self.tokens / self.config.tokens, sae.config.d_model)
            sae.project()
            sae.steer(losses.reconstructions[site].acts)
            self.sums[f"unexplained/{site}"] += losses.unexplained[site].detach() * n_tokens
            self.sums[f"active/{site}"] += losses.reconstructions[site].n_active
        self.sums["prediction"] += losses.prediction.detach() * n_tokens
        self.optimizer.step()
        self.optimizer.zero_grad()
        for sae in self.saes.values():
            sae.constrain()

    def _next_batch(self) -> tuple[Tokens, Tensor]:
        """The next batch in which a token counts, and which of its tokens do [B, S]; `make_trainable` has seen one."""
        while True:
            tokens = self.stream.take().to(self.model.device)
            counted = counted_tokens(self.model, tokens, special_tokens=not self.config.exclude_special)
            if counted.any():
                return tokens, counted

    def _log(self, lines: TextIO) -> str:
        n = max(1, self.tokens - self.logged_tokens)
        means = {name: total.item() / n for name, total in self.sums.items()}
        for site, group in zip(self.saes, self.optimizer.param_groups, strict=True):
            line = {"step": self.step, "tokens": self.tokens, "site": site.name, self.config.loss: means["prediction"]}
            line |= {"explained_variance": 1 - means[f"unexplained/{site}"], "l0": means[f"active/{site}"]}
            lines.write(json.dumps(line | {"learning_rate": group["lr"]}) + "\n")
        self.explained = {site.name: 1 - means[f"unexplained/{site}"] for site in self.saes}
        for total in self.sums.values():
            total.zero_()
        self.logged_tokens = self.tokens
        explained = 1 - sum(means[f"unexplained/{site}"] for site in self.saes) / len(self.saes)
        active = sum(means[f"active/{site}"] for site in self.saes) / len(self.saes)
        return f"{self.config.loss} {means['prediction']:.3f}, explained {explained:.3f}, L0 {active:.1f}"

    def _tensors(self) -> dict[str, Tensor]:
        return super()._tensors() | {f"sums/{name}": total for name, total in self.sums.items()}
