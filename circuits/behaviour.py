"""What is explained: one number per prompt, read from the logits after it.

A metric is a function `m(logits [B, V], prompts) -> [B]` of the logits at the last position. All metrics here are small
while the model behaves as on the clean prompt and **rise as the behaviour breaks**, so that delta = m(patch) - m(clean)
is positive and effects can be read alike. With A the answers of a prompt (usually one token) and logit(A) their mean:

| name | m | wants |
|---|---|---|
| `logit_difference` | logit(patch answers) - logit(clean answers); without patch answers -logit(clean answers) | |
| `log_probability` | -log p(clean answers), p summed over the answers | |
| `kl` | KL(p_clean || p) from the distribution after the clean prompt | `prepare` |
| `probe:FILE.safetensors` | w . x + b at a site, a linear probe's logit (`circuits.probes`) | `read_by` |
| `probe-margin:FILE` | -(w . x + b) times its sign on the clean prompt | `read_by`, `prepare` |

Any function of that signature will do as well, named on the command line as `package.module:function` or
`path/to/file.py:function`. A probe with several classes is named `probe:FILE.safetensors:CLASS`.

Shapes: B prompts, V vocabulary, n answers.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuits.probes import Probe, read_by
from circuits.prompts import PromptSet
from sae.errors import UserError, unknown

if TYPE_CHECKING:
    from sae.model import LanguageModel

log = logging.getLogger(__name__)

PROBES = ("probe:", "probe-margin:")
CANCELS = 0.2
"""Share of mean |delta| below which the mean of delta is nothing to explain."""
Metric = Callable[[Tensor, PromptSet], Tensor]


def at_least_float32(x: Tensor) -> Tensor:
    """x, in float32 where it has 16 bits: differences and means of metrics need more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def answer_logits(logits: Tensor, answers: Tensor) -> Tensor:
    """Mean logit of each prompt's answers, [B]. logits [B, V]; answers [B], or [B, n] padded with -1."""
    if answers.dim() == 1:
        return at_least_float32(logits.gather(1, answers[:, None])[:, 0])
    given = answers >= 0  # [B, n]
    picked = at_least_float32(logits.gather(1, answers.clamp(min=0)))  # [B, n]
    return (picked * given).sum(1) / given.sum(1)


def logit_difference(logits: Tensor, prompts: PromptSet) -> Tensor:
    """m = logit(patch answers) - logit(clean answers), [B]; without patch answers -logit(clean answers)."""
    clean = answer_logits(logits, prompts.clean_answers)
    if prompts.patch_answers is None:
        return -clean
    return answer_logits(logits, prompts.patch_answers) - clean


def log_probability(logits: Tensor, prompts: PromptSet) -> Tensor:
    """m = -log sum_{a in A} p(a), [B]: the surprise at the clean answers."""
    log_p = at_least_float32(logits).log_softmax(-1)  # [B, V]
    answers = prompts.clean_answers if prompts.clean_answers.dim() == 2 else prompts.clean_answers[:, None]  # [B, n]
    picked = log_p.gather(1, answers.clamp(min=0)).masked_fill(answers < 0, -torch.inf)
    return -picked.logsumexp(1)


def kl(logits: Tensor, prompts: PromptSet) -> Tensor:
    """m = sum_v p_clean(v) (log p_clean(v) - log p(v)), [B]. p_clean is `prompts.reference`, filled in by `prepare`."""
    if prompts.reference is None:
        raise UserError("the metric 'kl' compares with the model's own clean run: call behaviour.prepare(...) first")
    log_p = at_least_float32(logits).log_softmax(-1)  # [B, V]
    reference = prompts.reference.to(log_p)  # [B, V] log-probabilities
    return (reference.exp() * (reference - log_p)).sum(-1)


METRICS: dict[str, Metric] = {"logit_difference": logit_difference, "log_probability": log_probability, "kl": kl}
"""Metrics by the name the command line knows."""


def get_metric(metric: str | Metric) -> Metric:
    """A metric by name, by `probe:FILE`, by `package.module:function`, by `file.py:function`, or as it is."""
    if callable(metric):
        return metric
    if metric.startswith(PROBES):
        kind, _, rest = metric.partition(":")
        file, _, row = rest.partition(".safetensors:")
        probe = Probe.load(f"{file}.safetensors", row=row) if row else Probe.load(rest)
        return replace(probe, margin=True, name=f"margin, {probe.name}") if kind == "probe-margin" else probe
    if metric in METRICS:
        return METRICS[metric]
    if ":" not in metric:
        raise unknown("metric", metric, METRICS)
    place, _, name = metric.rpartition(":")
    try:
        function = getattr(_load_module(place), name)
    except (ImportError, OSError) as error:
        raise UserError(f"cannot import the metric {metric!r}: {error}") from error
    except AttributeError:
        raise UserError(f"metric {metric!r}: {place} has no function {name!r}") from None
    if not callable(function):
        raise UserError(f"metric {metric!r} is not a function of (logits, prompts)")
    return function


def absolute(metric: str) -> str:
    """The name of a metric with its file's path made absolute, so that a run can be read from another folder."""
    if metric.startswith(PROBES):
        kind, _, rest = metric.partition(":")
        file, suffix, row = rest.partition(".safetensors")
        return f"{kind}:{Path(file + suffix).resolve()}{row}"
    place, _, name = metric.rpartition(":")
    return f"{Path(place).resolve()}:{name}" if place.endswith(".py") else metric


def warn_if_cancelling(metric: Metric, delta: Tensor) -> None:
    """Warn where delta = m(patch) - m(clean), [B], has opposite signs on the prompts, so that |mean| is less than
    `CANCELS` of mean |delta|: effects cancel in the mean over prompts as it does.
    """
    mean, size = delta.mean().item(), delta.abs().mean().item()
    if abs(mean) >= CANCELS * size:
        return
    log.warning(
        "m changes by %.2g from clean to patch in the mean over prompts, but by %.2g on a prompt: prompts of opposite "
        "classes cancel, and so do effects; %s",
        mean,
        size,
        "use probe-margin:FILE in place of probe:FILE"
        if isinstance(metric, Probe)
        else "m should rise on every prompt as the behaviour breaks",
    )


def prepare(prompts: PromptSet, model: LanguageModel, metric: str | Metric, *, batch_size: int = 64) -> PromptSet:
    """The prompts with what the metric compares with: for `kl` the log-probabilities after the clean prompts, for the
    margin of a probe its sign there.
    """
    m = get_metric(metric)
    if isinstance(m, Probe) and m.margin and prompts.reference is None:
        return replace(prompts, reference=m.signs(model, prompts, batch_size=batch_size))
    if m is not kl or prompts.reference is not None:
        return prompts
    return replace(prompts, reference=last_logits(model, prompts, batch_size=batch_size).log_softmax(-1))


@torch.no_grad()
def last_logits(model: LanguageModel, prompts: PromptSet, *, batch_size: int = 64, edits=None) -> Tensor:
    """Logits after every clean prompt, [B, V], with optional edits (see `LanguageModel.run`, or a function of the batch
    that gives them).
    """
    return torch.cat([logits for _, logits in _batch_logits(model, prompts, edits, batch_size)])


@torch.no_grad()
def metric_values(model: LanguageModel, prompts: PromptSet, metric: Metric, *, batch_size: int = 64, edits=None):
    """m of every clean prompt, [B], whatever it reads, with optional edits as in `last_logits`."""
    read = read_by(model, metric)
    return torch.cat([metric(logits, batch) for batch, logits in _batch_logits(read, prompts, edits, batch_size)])


def _batch_logits(model, prompts, edits, batch_size) -> Iterator[tuple[PromptSet, Tensor]]:
    for batch in prompts.batches(batch_size):
        run = model.run(batch.clean, edits=edits(batch) if callable(edits) else edits, last_only=True)
        yield batch, run.logits[:, -1].float()


def correct(logits: Tensor, prompts: PromptSet) -> Tensor:
    """Whether each prompt is answered rightly, [B] bool.

    With patch answers: logit(clean answers) > logit(patch answers). Without: the likeliest token is a clean answer.
    """
    if prompts.patch_answers is not None:
        return logit_difference(logits, prompts) < 0
    answers = prompts.clean_answers if prompts.clean_answers.dim() == 2 else prompts.clean_answers[:, None]  # [B, n]
    return (logits.argmax(-1, keepdim=True) == answers).any(1)


def accuracy(logits: Tensor, prompts: PromptSet) -> float:
    """Share of prompts answered rightly (see `correct`)."""
    return correct(logits, prompts).float().mean().item()


def _load_module(place: str):
    """A module by dotted name, or from a Python file."""
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place)
    if not path.is_file():
        raise ImportError(f"no file {place}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{place} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
