"""Functions that travel to a server with a request (`sae.model.tracing`), as text.

They run where none of this package's code is, and may be compiled with restrictions: plain Python on torch alone, no
names with underscores in front. `envoy` is nnsight's handle of a module, a `step` what `request` says of one.
"""

from __future__ import annotations

import torch


def visit(step):  # type: ignore[no-untyped-def]
    """Make one step at a site; x [B, S, d] there, None where the module is passed by."""
    envoy, scale, rows = step["envoy"], step.get("scale", 1.0), step.get("rows")
    if step.get("passes"):
        envoy.skip(with_first(step.get("outputs"), first(envoy.input)))
        return None
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
    return x


def pulled(seen, incoming, sources):  # type: ignore[no-untyped-def]
    """The gradient at each source, from those that come in; both by key of `seen`."""
    outs = [seen[key] for key in incoming]
    sent = [incoming[key].to(seen[key]) for key in incoming]
    gradients = torch.autograd.grad(outs, [seen[key] for key in sources], sent, allow_unused=True)
    return [None if gradient is None else gradient.cpu() for gradient in gradients]


def described(step):  # type: ignore[no-untyped-def]
    """The kinds of what a module and its body return, with numbers of entries; the tensor, and a copy of it."""
    body = shape_of(step["body"].output) if "body" in step else shape_of(None)
    value = step["envoy"].input if step.get("entry") else step["envoy"].output
    outputs = shape_of(None if step.get("entry") else value)
    return {"body": body, "outputs": outputs, "tensor": first(value), "copy": first(value).detach().clone()}


def as_sent(entry):  # type: ignore[no-untyped-def]
    """The entry of `described` once the pass is over: the tensor as it was, and whether it was changed since."""
    changed = bool((entry["tensor"] != entry["copy"]).any())
    return {**entry, "tensor": entry["copy"].cpu(), "copy": None, "changed": changed}


def shape_of(value):  # type: ignore[no-untyped-def]
    """Kind and number of entries of a tuple or list; "" and 0 of anything else."""
    kind = "tuple" if isinstance(value, tuple) else "list" if isinstance(value, list) else ""
    return [kind, len(value) if kind else 0]


def first(value):  # type: ignore[no-untyped-def]
    """The tensor, or the first entry of a tuple or list."""
    return value[0] if isinstance(value, (tuple, list)) else value


def with_first(value, x):  # type: ignore[no-untyped-def]
    """A tuple or list with x for its first entry; x in place of anything else."""
    if isinstance(value, tuple):
        return (x, *value[1:])
    return [x, *value[1:]] if isinstance(value, list) else x


def logits_of(output):  # type: ignore[no-untyped-def]
    """The logits of what a model returns."""
    return first(output.logits if hasattr(output, "logits") else output)
