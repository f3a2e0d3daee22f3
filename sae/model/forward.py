"""Arguments and results of a Hugging Face model's forward pass, and the tokens of checks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from sae.errors import UserError
from sae.model.sites import Site
from sae.model.tokens import Tokens

F = TypeVar("F", bound=Callable[..., Any])

PROBE_ROWS, PROBE_POSITIONS = 3, 5
RESERVED = ("_token_id", "_token_index")  # how a config calls tokens that stand for an image, a pause, ...


@dataclass(frozen=True)
class Run:
    """Activations and logits of one forward pass."""

    activations: dict[Site, Tensor]
    """The captured sites in forward order, each [B, S, d], after the edit at the site if there was one."""
    logits: Tensor
    """[B, S, V]; [B, 1, V] where only the last position was asked for, empty [0] where none was."""
    pull_back: Callable[[Tensor, Sequence[Site]], list[Tensor | None]] | None = None
    """For a model elsewhere: asks for gradients at sites, which no graph of this process leads to."""

    def gradients(
        self, m: Tensor, sites: Sequence[Site], *, allow_unused: bool = False, retain_graph: bool = False
    ) -> list[Tensor]:
        """dm/dx [B, S, d] at sites that were captured in a run with `grad`, for a number m of its logits and captured
        activations; RuntimeError where no path leads to one, or None for it if `allow_unused`.
        """
        if self.pull_back is None:
            x = [self.activations[site] for site in sites]
            return list(torch.autograd.grad(m, x, allow_unused=allow_unused, retain_graph=retain_graph))
        gradients = self.pull_back(m, sites)
        if any(gradient is None for gradient in gradients) and not allow_unused:
            raise RuntimeError("one of the sites does not reach what is differentiated")
        return cast(list[Tensor], gradients)

    def check_finite(self) -> None:
        """Raise UserError naming the first site whose activations hold NaN or infinity, or the logits."""
        named = [(f"activations at site {site.name!r}", x) for site, x in self.activations.items()]
        for name, x in [*named, ("logits", self.logits)]:
            if not bool(torch.isfinite(x).all()):
                n = int((~torch.isfinite(x)).sum())
                raise UserError(f"{name}: {n} of {x.numel()} values are NaN or infinite; check weights and number type")


def is_exact(x: Tensor | torch.dtype) -> bool:
    """Whether numbers have at least the precision of float32."""
    return (x.dtype if isinstance(x, Tensor) else x) in (torch.float32, torch.float64)


def relative_difference(x: Tensor, y: Tensor) -> float:
    """max |x - y| / max |y|, in float32."""
    x, y = x.detach().float(), y.detach().float()
    return float((x - y).abs().max() / y.abs().max().clamp_min(torch.finfo(torch.float32).tiny))


def fitted(skip: Mapping[Site, Tensor], model: Any, *, rows: int) -> dict[Site, Tensor]:
    """Skip tensors in the number type of a `LanguageModel`, repeated to the rows of the batch; one copy for a shared
    tensor.
    """
    widths, dtype = model.widths, model.dtype
    copies: dict[int, Tensor] = {}
    for site, x in skip.items():
        if x.ndim != 3 or x.shape[-1] != widths[site] or rows % x.shape[0]:
            raise UserError(
                f"skip tensor of site {str(site)!r} has shape {list(x.shape)}: allowed is [rows, positions, "
                f"{widths[site]}] with rows dividing {rows}"
            )
        if id(x) not in copies:
            times = rows // x.shape[0]
            copies[id(x)] = (x if times == 1 else x.repeat(times, 1, 1)).to(dtype)
    return {site: copies[id(x)] for site, x in skip.items()}


def forward_inputs(module: nn.Module, tokens: Tokens, *, last_only: bool = False) -> dict[str, Any]:
    """Arguments of the forward pass; an optional one is left out where the model does not take it."""
    accepts, takes_any = _parameters(type(module).forward)
    optional: dict[str, Any] = {"position_ids": tokens.position_ids, "use_cache": False}
    if last_only:
        optional["logits_to_keep"] = 1
    inputs: dict[str, Any] = {"input_ids": tokens.input_ids}
    if takes_any or "attention_mask" in accepts:
        inputs["attention_mask"] = tokens.attention_mask
    return inputs | {name: value for name, value in optional.items() if name in accepts}


@functools.cache
def _parameters(forward: Callable[..., Any]) -> tuple[frozenset[str], bool]:
    """Names of a function's parameters, and whether it takes others: looked up anew, a twentieth of a small run."""
    parameters = inspect.signature(forward).parameters
    return frozenset(parameters), any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def probe_tokens(hf: Any) -> Tokens:
    """A few random tokens, the same every time; none that the config reserves."""
    n_tokens = hf.get_input_embeddings().weight.shape[0]
    reserved = reserved_ids(getattr(hf, "config", None))
    allowed = torch.tensor([index for index in range(n_tokens) if index not in reserved] or [0])
    draw = torch.randint(len(allowed), (PROBE_ROWS, PROBE_POSITIONS), generator=torch.Generator().manual_seed(0))
    return Tokens(allowed[draw], torch.ones_like(draw))


def padding_tokens(probe: Tokens) -> Tokens:
    """Three rows of the first of the probe's: as it is, with another last token, and its beginning behind padding."""
    row = probe.input_ids[0].cpu()
    n = len(row) // 2  # of padding
    other = probe.input_ids[1].cpu()
    rows = [row, torch.cat([row[:-1], other[-1:] if other[-1] != row[-1] else other[:1]])]
    rows.append(torch.cat([other[:n], row[: len(row) - n]]))
    mask = torch.ones(len(rows), len(row), dtype=torch.int64)
    mask[-1, :n] = 0
    return Tokens(torch.stack(rows), mask)


def reserved_ids(config: Any) -> set[int]:
    """Ids that a config gives a meaning beyond text, such as the token that stands for an image."""
    values = vars(config) if config is not None else {}
    ids = (value for name, value in values.items() if name.endswith(RESERVED))
    return {value for value in ids if isinstance(value, int)}


def outside_inference_mode() -> AbstractContextManager[Any]:
    """Leaves inference mode where it is on; to leave it anyway would switch autograd's threads on as well."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def with_gradients(function: F) -> F:
    """The function can take gradients, whatever its caller switched off."""

    @functools.wraps(function)
    def inner(*args: Any, **options: Any) -> Any:
        with outside_inference_mode(), torch.enable_grad():
            return function(*args, **options)

    return cast(F, inner)


def cannot_run(name: str, error: Exception) -> UserError:
    """The sentence for a model whose forward pass fails."""
    if isinstance(error, UserError):
        return error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[-1] if lines else ''}"
    return UserError(
        f"model {name!r} cannot run on a few random tokens ({reason}): its config.json and its weights must belong "
        "together, and it must be a decoder that needs no more than text"
    )


def config_constants(hf: Any) -> list[float]:
    """The numbers with a fraction in a model's config, such as the factor of what is added to the residual stream."""
    config = getattr(hf, "config", None)
    configs = [vars(one) for one in (config, getattr(config, "text_config", None)) if one is not None]
    return [value for entries in configs for value in entries.values() if isinstance(value, float)]


class Batched(Protocol):
    """The attributes of a model that say which rows may share a batch."""

    name: str
    padding_shows: bool

    @property
    def architecture(self) -> Any:
        """The modules and the config."""


def longest_alike(hf: Any) -> int | None:
    """Most tokens of a padded batch whose rows count their positions alike; None where nothing bounds them.

    Beyond, rotary positions are scaled for all rows because of the longest one (longrope), or queries by where they
    stand in the padded row and not in their text (Llama 4's temperature). Where that begins early the probe shows it.
    """
    config = getattr(hf, "config", None)
    configs = [one for one in (config, getattr(config, "text_config", None)) if one is not None]
    bounds = [int(one.floor_scale) - 1 for one in configs if getattr(one, "attn_temperature_tuning", False)]
    for one in configs:
        ropes = getattr(one, "rope_parameters", None) or {}
        for rope in (ropes, *(value for value in ropes.values() if isinstance(value, dict))):
            bound = rope.get("original_max_position_embeddings")
            bounds += [int(bound)] if rope.get("rope_type") == "longrope" and bound else []
    return min((bound for bound in bounds if bound >= PROBE_POSITIONS), default=None)


def unequal_lengths(model: Batched, tokens: Tokens, *, more: int = 0) -> UserError | None:
    """The refusal of rows that cannot share a batch, with `more` generated tokens; None where they can."""
    longest = longest_alike(model.architecture)
    beyond = longest is not None and tokens.n_positions + more > longest
    if not (model.padding_shows or beyond) or bool(tokens.attention_mask.all()):
        return None
    why = (
        "has a state that runs over padding"
        if model.padding_shows
        else f"scales positions by the longest text of a batch of more than {longest} tokens"
    )
    lengths = ", ".join(map(str, sorted(set(tokens.lengths.tolist()))))
    return UserError(f"model {model.name!r} {why}: give prompts of equal length in tokens (these have {lengths})")


def run_by_length(tokens: Tokens, run: Callable[[Tokens], Run]) -> Run:
    """Activations [B, S, d] and logits of rows of equal length run together without padding, where both are zero."""
    lengths = tokens.lengths
    groups = {n: (lengths == n).nonzero().flatten() for n in sorted(set(lengths.tolist()))}
    runs = [run(Tokens(tokens.input_ids[rows, -n:], tokens.attention_mask[rows, -n:])) for n, rows in groups.items()]

    def together(values: list[Tensor], n_positions: int) -> Tensor:
        """[B, S, d] of each group's values [n, s, d], which end at the last position."""
        out = values[0].new_zeros(len(tokens), n_positions, values[0].shape[-1])
        for rows, x in zip(groups.values(), values, strict=True):
            out[rows, n_positions - x.shape[1] :] = x
        return out

    activations = {
        site: together([result.activations[site] for result in runs], tokens.n_positions)
        for site in runs[0].activations
    }
    logits = [result.logits for result in runs]
    if logits[0].ndim < 3:  # none were asked for
        return Run(activations, logits[0])
    last_only = all(x.shape[1] == 1 for x in logits)
    return Run(activations, together(logits, 1 if last_only else tokens.n_positions))
