"""All that is asked of nnsight, which no other file imports: handles of modules, and requests to a model elsewhere.

A request is one nnsight trace that nnsight sends to a server (NDIF, or its own simulation of one in this process). What
travels there is the text of the `with` block below and what its names hold: handles, tensors, numbers, functions of
torch. Nothing of this package is among it, so a server needs none of our code, and only saved tensors come back. The
block is plain Python for the same reason: a server compiles it with restrictions, such as no names with underscores.
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

Step = dict[str, Any]
"""What a request does at one site: see `request`."""


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
    differentiate = bool(incoming)
    save = nnsight.save
    try:
        with torch.set_grad_enabled(differentiate), root.trace(**inputs, remote=remote):

            def first(value):  # type: ignore[no-untyped-def]
                return value[0] if isinstance(value, (tuple, list)) else value

            def with_first(value, x):  # type: ignore[no-untyped-def]
                if isinstance(value, tuple):
                    return (x,) + tuple(value[1:])  # noqa: RUF005
                return [x] + list(value[1:]) if isinstance(value, list) else x  # noqa: RUF005

            seen = {}
            for step in steps:
                envoy, scale, rows = step["envoy"], step.get("scale", 1.0), step.get("rows")
                if step.get("passes"):
                    envoy.skip(with_first(step.get("outputs"), first(envoy.input)))
                    continue
                given = step.get("value")
                if given is None:
                    value = first(envoy.input if step.get("entry") else envoy.output)
                    x = value if rows is None else value.unflatten(0, (rows, -1))
                    x = x if scale == 1.0 else x * scale
                    x = x.clone() if step.get("copy") else x
                    x = x.detach().requires_grad_(True) if step.get("leaf") else x
                    x = step["function"](x) if "function" in step else x
                else:
                    x = given.to(first(step.get("body", envoy).input).device).detach()
                    x = x.requires_grad_(True) if step.get("leaf") else x
                seen[step["key"]] = x
                value = x if scale == 1.0 else x / scale
                value = value if rows is None else value.flatten(0, 1)
                value = value.clone() if step.get("copy") else value
                if step.get("entry"):
                    envoy.input = value
                elif given is None:
                    envoy.output = with_first(envoy.output, value)
                else:
                    if "body" in step:
                        step["body"].skip(with_first(step.get("body_outputs"), torch.zeros_like(value)))
                    envoy.skip(with_first(step.get("outputs"), value))
            results = {}
            if differentiate or logits:
                output = root.output
                seen["logits"] = first(output.logits if hasattr(output, "logits") else output)
            if differentiate:
                keys = list(incoming)
                outs = [seen[key] for key in keys]
                sent = [incoming[key].to(seen[key]) for key in keys]
                pulled = torch.autograd.grad(outs, [seen[key] for key in sources], sent, allow_unused=True)
                for key, gradient in zip(sources, pulled):  # noqa: B905
                    results[key] = None if gradient is None else gradient.cpu()
            else:
                for key in seen:
                    results[key] = seen[key].detach().cpu()
            answer = save(results)
    except Exception as error:
        raise failed(error) from error
    return answer


def structure(
    root: TransformersModel, remote: bool | str, inputs: Mapping[str, Tensor], steps: Sequence[Step]
) -> dict[str, Any]:
    """What modules return: for each key `kind` ("tuple", "list" or "") and `entries` of the output, the same of the
    body, the `tensor` and whether it is `changed` before the pass is over; and "logits". Steps as in `request`.
    """
    inputs, steps, save = dict(inputs), list(steps), nnsight.save
    try:
        with torch.no_grad(), root.trace(**inputs, remote=remote):

            def shape_of(value):  # type: ignore[no-untyped-def]
                kind = "tuple" if isinstance(value, tuple) else "list" if isinstance(value, list) else ""
                return [kind, len(value) if kind else 0]

            def first(value):  # type: ignore[no-untyped-def]
                return value[0] if isinstance(value, (tuple, list)) else value

            described = {}
            tensors = {}
            for step in steps:
                entry = {}
                if "body" in step:
                    entry["body"] = shape_of(step["body"].output)
                value = step["envoy"].input if step.get("entry") else step["envoy"].output
                entry["outputs"] = shape_of(None if step.get("entry") else value)
                tensors[step["key"]] = first(value)
                entry["tensor"] = first(value).detach().clone()
                described[step["key"]] = entry
            output = root.output
            logits = first(output.logits if hasattr(output, "logits") else output).detach().cpu()
            for key in described:
                before = described[key]["tensor"]
                changed = bool((tensors[key] != before).any())
                described[key] = {**described[key], "tensor": before.cpu(), "changed": changed}
            answer = save({"sites": described, "logits": logits})
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
