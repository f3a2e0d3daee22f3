"""All that is asked of nnsight, which no other file imports: handles of modules, and requests to a model elsewhere.

A request is one nnsight trace that nnsight sends to a server (NDIF, or its own simulation of one in this process). What
travels there is the text of the `with` block below and of `sae.model.shipped`, and handles, tensors and numbers. So a
server needs none of this package's code, and only what was saved comes back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import nnsight
import torch
from nnsight import CONFIG, Envoy, TransformersModel
from torch import Tensor, nn

from sae._files import shorten
from sae.errors import UserError
from sae.model import shipped

nnsight.register(shipped.__name__)  # its functions travel as text

Step = dict[str, Any]
"""One site of a request: see `request`."""


class _Handle(Envoy):
    """nnsight's handle of a module; inputs stay where they are, for the first parameter may wait on disk."""

    device = None


def handles(hf: nn.Module) -> Envoy:
    """The handle of a model, and of every module in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a module is called `output`: `envoy_of` knows
        return _Handle(hf, envoys=_Handle)


def trace(root: Envoy, inputs: Mapping[str, Any], visits: Iterable[Callable[[], None]], *, need_logits: bool) -> Tensor:
    """The logits of one forward pass here, with these visits to its sites in forward order; empty if not needed."""
    outputs: list[Any] = []
    with root.trace(**inputs):
        for visit in visits:
            visit()
        if need_logits:
            outputs.append(root.output)
    if not need_logits:
        return torch.empty(0, device=inputs["input_ids"].device)
    logits = getattr(outputs[0], "logits", outputs[0])
    return logits[0] if isinstance(logits, tuple) else logits


def server_handles(model: str | nn.Module, tokenizer: Any, revision: str | None = None) -> TransformersModel:
    """The handle of a model that requests can name: a model that is here, for the simulation, or the architecture of
    one on the hub without weights.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(model, nn.Module):
            return TransformersModel(model, tokenizer=tokenizer, task="text-generation", device="cpu")
        return TransformersModel(model, tokenizer=tokenizer, task="text-generation", revision=revision)


def has_key() -> bool:
    """Whether nnsight has a key for NDIF: from NDIF_API_KEY, or from its own settings."""
    return bool(CONFIG.API.APIKEY)


def request(
    root: TransformersModel,
    remote: bool | str,
    inputs: Mapping[str, Tensor],
    steps: Sequence[Step],
    *,
    logits: bool = True,
    cotangents: Mapping[str, Tensor] | None = None,
    sources: Sequence[str] = (),
) -> dict[str, Any]:
    """One forward pass on the server, and a backward pass where there are cotangents.

    Args:
        root: handle of the model.
        remote: True for NDIF, the address of another server, or "local" for nnsight's simulation.
        inputs: arguments of the model's forward pass.
        steps: what to do at sites, in forward order. Each has `key` and `envoy` (handle of the module), and may have
            `body` (of the sublayer that the module alone reads), `outputs` and `body_outputs` (the tuple or list that
            the module returns, with None for its entries), `entry` (x is the module's input), `rows` (B where the
            module's tensor is [B * S, d]), `scale` (x is so many times the tensor), `copy` (the model changes the
            tensor later); then one of `passes` (the output is the input), `value` (x, and the module does not run),
            `function` (of torch, applied to x), none of them to read x; and `leaf`: gradients start here.
        logits: whether the logits are returned.
        cotangents: by key, or "logits": gradients of what is differentiated.
        sources: keys of the x, each with `leaf` or after such a one, with respect to which it is differentiated.

    Returns:
        Without cotangents x by key of every step that is read or changed, and "logits"; else the gradient by source,
        None where no path leads there.

    Raises:
        UserError: the server refused, failed or cannot be reached, in one sentence.
    """
    inputs, steps, sources = dict(inputs), list(steps), list(sources)
    incoming = dict(cotangents or {})
    save, visit, pulled, logits_of = nnsight.save, shipped.visit, shipped.pulled, shipped.logits_of
    try:
        with torch.set_grad_enabled(bool(incoming)), root.trace(**inputs, remote=remote):
            seen = {}
            for step in steps:
                x = visit(step)
                if x is not None:
                    seen[step["key"]] = x
            if incoming or logits:
                seen["logits"] = logits_of(root.output)
            if incoming:
                results = dict(zip(sources, pulled(seen, incoming, sources)))  # noqa: B905
            else:
                results = {key: seen[key].detach().cpu() for key in seen}
            answer = save(results)
    except Exception as error:
        raise failed(error) from error
    return answer


def structure(
    root: TransformersModel, remote: bool | str, inputs: Mapping[str, Tensor], steps: Sequence[Step]
) -> dict[str, Any]:
    """The `sites`: by key `outputs` of the module and of its `body` (kind of a tuple or list, number of entries), the
    `tensor`, and whether it is `changed` before the pass is over; and the `logits`. Steps as in `request`.
    """
    inputs, steps, save = dict(inputs), list(steps), nnsight.save
    described, as_sent, logits_of = shipped.described, shipped.as_sent, shipped.logits_of
    try:
        with torch.no_grad(), root.trace(**inputs, remote=remote):
            seen = {}
            for step in steps:
                seen[step["key"]] = described(step)
            logits = logits_of(root.output).detach().cpu()
            answer = save({"sites": {key: as_sent(seen[key]) for key in seen}, "logits": logits})
    except Exception as error:
        raise failed(error) from error
    return answer


def samples(
    root: TransformersModel, remote: bool | str, weights: Sequence[tuple[Envoy, str, slice]], ids: Tensor
) -> list[Tensor]:
    """Some values of each weight: handle of its module, its name there, and which of its numbers in a row."""
    weights, save = list(weights), nnsight.save
    inputs = {"input_ids": ids}
    try:
        with torch.no_grad(), root.trace(**inputs, remote=remote):
            taken = []
            for envoy, name, index in weights:
                taken.append(getattr(envoy, name).detach().flatten()[index].cpu())
            logits = root.output  # noqa: F841  # a trace that asks for nothing of the model does not run
            answer = save(taken)
    except Exception as error:
        raise failed(error) from error
    return answer


def failed(error: Exception) -> Exception:
    """One sentence for what a server, or the way to it, gave; raise what this returns. An error of the model itself
    stays what it is.
    """
    kind = type(error)
    root = kind.__module__.partition(".")[0]
    if (
        kind.__name__ != "RemoteError"
        and root not in ("httpx", "websocket", "huggingface_hub")
        and not isinstance(error, ConnectionError | TimeoutError)
    ):
        return error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = shorten(lines[-1] if lines else kind.__name__, 300)
    return UserError(f"the remote model did not answer ({kind.__name__}: {words}): host {CONFIG.API.HOST}")
