"""Metrics: the behaviour as one number per prompt, read from the logits after it.

A metric is a function `m(logits [B, V], prompts) -> [B]` of the logits at the last position. All metrics here are small
while the model behaves as on the clean prompt and **rise as the behaviour breaks**, so that delta = m(patch) - m(clean)
is positive and effects can be read alike. With A the answers of a prompt (usually one token) and logit(A) their mean:

| name | m | wants |
|---|---|---|
| `logit_difference` | logit(patch answers) - logit(clean answers); without patch answers -logit(clean answers) | |
| `log_probability` | -log p(clean answers), p summed over the answers | |
| `kl` | KL(p_clean || p) from the distribution after the clean prompt | `prepare` |
| `probe:FILE.safetensors` | w . x + b at a site, a linear probe's logit (`circuits.metrics.probe`) | `read_by` |
| `probe-margin:FILE` | -(w . x + b) times its sign on the clean prompt | `read_by`, `prepare` |

Any function of that signature will do as well, named on the command line as `package.module:function` or
`path/to/file.py:function`. A probe with several classes is named `probe:FILE.safetensors:CLASS`. A circuit keeps the
name and fingerprint of its metric (`circuits.metrics.identity`); code is never run because a circuit names it
(`circuit_metric`).

Shapes: B prompts, V vocabulary, n answers.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuits.metrics.identity import code_fingerprint, code_name, names_code
from circuits.metrics.probe import Probe, read_by
from circuits.prompts.dataset import PromptSet
from sae.errors import UserError, unknown
from sae.model.hook_points import SiteEdit
from sae.model.language_model import LanguageModel
from sae.model.sites import Site

log = logging.getLogger(__name__)

PROBES = ("probe:", "probe-margin:")
CANCELS = 0.2
"""Share of mean |delta| below which the mean of delta is nothing to explain."""
TRIED_PROMPTS = 8
"""Prompts on which a user's metric is tried before it is used."""
Metric = Callable[[Tensor, PromptSet], Tensor]
Edits = Mapping[Site, SiteEdit] | Callable[[PromptSet], Mapping[Site, SiteEdit]]


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
        raise UserError("the metric 'kl' compares with the model's own clean run: call prepare(...) first")
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
    module, _, name = metric.rpartition(":")
    try:
        function = getattr(_load_module(module), name)
    except (ImportError, OSError) as error:
        raise UserError(f"cannot import the metric {metric!r}: {error}") from error
    except AttributeError:
        raise UserError(f"metric {metric!r}: {module} has no function {name!r}") from None
    if not callable(function):
        raise UserError(f"metric {metric!r} is not a function of (logits, prompts)")
    return function


def absolute(metric: str) -> str:
    """The name of a metric with its file's path made absolute, so that a run can be read from another folder."""
    if metric.startswith(PROBES):
        kind, _, rest = metric.partition(":")
        file, suffix, row = rest.partition(".safetensors")
        return f"{kind}:{Path(file + suffix).resolve()}{row}"
    module, _, name = metric.rpartition(":")
    return f"{Path(module).resolve()}:{name}" if module.endswith(".py") else metric


# ------------------------------------------------------------------------------------------ which metric it is


def metric_name(metric: str | Metric) -> str:
    """The name a circuit keeps of its metric: as the command line has it, or `module:function` of a Python object."""
    if isinstance(metric, str):
        return absolute(metric)
    return next((name for name, function in METRICS.items() if function is metric), None) or code_name(metric)


def metric_title(metric: Metric, prompts: PromptSet) -> str:
    """The name of the metric's values in tables; those of the logit difference are shown with the other sign."""
    if metric is logit_difference:
        return "logit difference" if prompts.patch_answers is not None else "answer logit"
    if metric is log_probability or metric is kl:
        return "-log p(answer)" if metric is log_probability else "KL from the clean run"
    return getattr(metric, "name", None) or code_name(metric).rpartition(":")[2]


def has_shares(metric: Metric) -> bool:
    """Whether m after an edit over m before is the share of the behaviour that is left; where the metric is itself a
    distance from the clean run, or a surprise, it is not.
    """
    return metric not in (kl, log_probability)


def metric_fingerprint(metric: Metric) -> str | None:
    """A hash of what the metric computes; None for the package's own, and for code that cannot be compared."""
    if metric in METRICS.values():
        return None
    if isinstance(metric, Probe):
        return code_fingerprint(metric.weight, metric.bias, metric.site.name, metric.position, metric.margin)
    return code_fingerprint(metric)


def circuit_metric(metadata: Mapping[str, Any], *, given: str | Metric | None = None) -> Metric:
    """The metric a circuit explains, by what it keeps of it.

    Code that a circuit names is not run: it has to be given again, and is compared with what the circuit was found
    with. Raises UserError where it is not given, or is another one.
    """
    name = metadata["options"]["metric"]
    if given is None and names_code(name):
        raise UserError(
            f"the circuit explains the metric {name!r}, which is Python code; code that a run names is not run by "
            "itself: give the metric again (--metric, in Python metric=)"
        )
    metric = get_metric(name if given is None else given)
    if given is not None and not names_code(name) and metric_name(given) != name:
        raise UserError(f"the circuit explains the metric {name!r}, not {metric_name(given)!r}: leave the metric out")
    before, now = metadata.get("metric_fingerprint"), metric_fingerprint(metric)
    if before is not None and before != now:
        what = "the same function" if names_code(name) else "the probe it was found with"
        shown = name if given is None else metric_name(given)
        raise UserError(
            f"the circuit explains the metric {name!r} with fingerprint {before}, and {shown!r} now has "
            f"{now or 'none'}: give {what}, or discover the circuit again"
        )
    if before is None and names_code(name):
        log.warning("whether the metric is the one the circuit was found with (%s) cannot be compared", name)
    return metric


def check_values(values: Any, n_prompts: int, metric: Metric, *, differentiable: bool = False) -> None:
    """`UserError` unless a metric gave one finite number for every prompt, with a gradient where it is needed."""
    title = code_name(metric)
    if not isinstance(values, Tensor):
        raise UserError(f"metric {title!r} gave {type(values).__name__}, expected a tensor of shape [{n_prompts}]")
    if list(values.shape) != [n_prompts]:
        raise UserError(
            f"metric {title!r} gave shape {list(values.shape)}, expected [{n_prompts}]: one number for every prompt"
        )
    if not values.is_floating_point():
        raise UserError(f"metric {title!r} gave {str(values.dtype)[6:]} numbers, expected float32")
    if not values.isfinite().all():
        row = int((~values.isfinite()).nonzero()[0, 0])
        raise UserError(f"metric {title!r} gave {values[row].item()} for prompt {row}: it must be finite")
    if differentiable and not values.requires_grad:
        raise UserError(f"metric {title!r} has no gradient: it must be a differentiable function of the logits")


def try_metric(model: LanguageModel, prompts: PromptSet, metric: Metric, *, differentiable: bool = False) -> None:
    """Call a user's metric on a few prompts before any long work; see `check_values`."""
    if isinstance(metric, Probe) or metric in METRICS.values():
        return
    batch = prompts[: min(TRIED_PROMPTS, len(prompts))]
    with torch.enable_grad():
        logits = model.run(batch.clean, last_only=True).logits[:, -1].detach().requires_grad_(True)
        values = metric(logits, batch)
    check_values(values, len(batch), metric, differentiable=differentiable)


# ------------------------------------------------------------------------------------------ running it


def warn_if_cancelling(metric: Metric, delta: Tensor) -> bool:
    """Warn where delta = m(patch) - m(clean), [B], has opposite signs on the prompts, so that |mean| is less than
    `CANCELS` of mean |delta|: effects cancel in the mean over prompts as it does. Of a probe without patch prompts,
    delta is what there is to lose, -m(clean). Says whether it warned.
    """
    mean, size = delta.mean().item(), delta.abs().mean().item()
    if abs(mean) >= CANCELS * size:
        return False
    log.warning(
        "m changes by %.2g in the mean over prompts, but by %.2g on a prompt: prompts of opposite classes cancel, and "
        "so do effects; %s",
        mean,
        size,
        "use probe-margin:FILE in place of probe:FILE"
        if isinstance(metric, Probe)
        else "m should rise on every prompt as the behaviour breaks",
    )
    return True


def prepare(
    prompts: PromptSet,
    model: LanguageModel,
    metric: str | Metric,
    *,
    batch_size: int = 64,
    differentiable: bool = False,
) -> PromptSet:
    """The prompts with what the metric compares with: for `kl` the log-probabilities after the clean prompts, for the
    margin of a probe its sign there. A user's function is tried first (`try_metric`).

    differentiable: whether a gradient of the metric is needed.
    """
    m = get_metric(metric)
    try_metric(model, prompts, m, differentiable=differentiable)
    if isinstance(m, Probe) and m.margin and prompts.reference is None:
        return replace(prompts, reference=m.signs(model, prompts, batch_size=batch_size))
    if m is not kl or prompts.reference is not None:
        return prompts
    return replace(prompts, reference=last_logits(model, prompts, batch_size=batch_size).log_softmax(-1))


@torch.no_grad()
def last_logits(
    model: LanguageModel, prompts: PromptSet, *, batch_size: int = 64, edits: Edits | None = None
) -> Tensor:
    """Logits after every clean prompt, [B, V], with optional edits (see `LanguageModel.run`, or a function of the batch
    that gives them).
    """
    return torch.cat([logits for _, logits in _batch_logits(model, prompts, edits, batch_size)])


@torch.no_grad()
def metric_values(
    model: LanguageModel, prompts: PromptSet, metric: Metric, *, batch_size: int = 64, edits: Edits | None = None
) -> Tensor:
    """m of every clean prompt, [B], whatever it reads, with optional edits as in `last_logits`."""
    read = read_by(model, metric)
    return torch.cat([metric(logits, batch) for batch, logits in _batch_logits(read, prompts, edits, batch_size)])


@torch.no_grad()
def values_and_correct(
    model: LanguageModel, prompts: PromptSet, metric: Metric, *, batch_size: int = 64, edits: Edits | None = None
) -> tuple[Tensor, Tensor]:
    """m of every clean prompt and whether it is answered rightly, [B] each, from the same runs; not for probes."""
    batches = [
        (metric(logits, batch), correct(logits, batch))
        for batch, logits in _batch_logits(model, prompts, edits, batch_size)
    ]
    values, right = zip(*batches, strict=True)
    return torch.cat(values), torch.cat(right)


def _batch_logits(
    model: LanguageModel, prompts: PromptSet, edits: Edits | None, batch_size: int
) -> Iterator[tuple[PromptSet, Tensor]]:
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


def mean_accuracy(model: LanguageModel, prompts: PromptSet, *, batch_size: int = 64) -> float:
    """Share of prompts that the model answers rightly (see `correct`), batch by batch."""
    batches = _batch_logits(model, prompts, None, batch_size)
    return torch.cat([correct(logits, batch) for batch, logits in batches]).float().mean().item()


def _load_module(name: str) -> Any:
    """A module by dotted name, or from a Python file."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name)
    if not path.is_file():
        raise ImportError(f"no file {name}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
