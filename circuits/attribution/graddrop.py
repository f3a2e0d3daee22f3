"""GradDrop: attribution patching that cancellation between direct and indirect paths cannot hide a node from.

AtP* (Kramar et al. 2024, arXiv 2403.00745, section 3.1.2). Legend: B examples, S positions, d width, L layers.

A node's direct effect and its effect through later layers may nearly cancel at the clean run although patching it
matters. So, for each layer l in turn,

1. take the gradient g_l = dm/dx of the clean run with the gradient through layer l's contribution to the residual
   stream, resid_l - resid_{l-1}, blocked; one forward pass serves all L backward passes;
2. contract it to effects (f_patch - f_clean)_i * (W_dec[i] . g_l).

The effect of a node is the mean magnitude over l, with the sign of the signed mean so that effects read as in the
other methods. A node inside layer l (attn_l, mlp_l) has no path when that layer is blocked: its mean is over the other
L - 1 runs, as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from circuits.attribution.activations import ActivationPair
from circuits.attribution.effects import SiteEffects
from sae.errors import UserError
from sae.model.hook_points import SiteEdit
from sae.model.sites import Site


@torch.enable_grad()
def gradients_with_layer_blocked(
    states: ActivationPair, *, sites: Sequence[Site]
) -> Iterator[tuple[int, dict[Site, Tensor]]]:
    """For each layer l: dm/dx at the clean run without what goes through layer l's contribution, [B, S, d] per site
    outside that layer's sublayers.
    """
    model = states.setting.model
    stream = [Site("embed"), *(Site("resid", layer) for layer in range(model.n_layers))]
    if lacking := [site for site in stream if site not in model.sites]:
        raise UserError(
            f"method 'graddrop' needs the residual stream, and model {model.name!r} has no site {lacking[0].name!r}: "
            "use attrib"
        )
    blocked = -1
    arrived: dict[int, Tensor] = {}

    def gate(layer: int) -> SiteEdit:
        def edit(x: Tensor) -> Tensor:
            if layer >= 0:
                before = arrived[layer - 1]
                contribution = x - before
                contribution.register_hook(lambda g: torch.zeros_like(g) if blocked == layer else g)
                x = x.detach() + (before - before.detach()) + (contribution - contribution.detach())
            arrived[layer] = x
            return x

        return edit

    edits = {site: gate(layer) for layer, site in enumerate(stream, start=-1)}
    run = model.run(states.tokens, capture=sites, edits=edits, grad=True, last_only=True)
    m = states.setting.metric(run.logits[:, -1], states.prompts).sum()
    for layer in range(model.n_layers):
        blocked = layer
        open_sites = [site for site in sites if site.layer != layer or site.kind == "resid"]
        gradients = torch.autograd.grad(m, [run.activations[site] for site in open_sites], retain_graph=True)
        yield layer, dict(zip(open_sites, gradients, strict=True))


def mean_magnitude(several: Sequence[SiteEffects]) -> SiteEffects:
    """Mean of |value| over several effects of one site, with the sign of the mean; absent entries count as zero."""
    together = SiteEffects.concatenate(several)
    keys = torch.stack([together.example, together.position, together.feature])
    (example, position, feature), entry = keys.unique(dim=1, return_inverse=True)
    zeros = torch.zeros(len(example), dtype=torch.float64)
    signed = zeros.index_add(0, entry, together.value.double())
    magnitude = zeros.index_add(0, entry, together.value.double().abs()) / len(several)
    value = torch.where(signed < 0, -magnitude, magnitude).float()
    return SiteEffects(together.n_features, example, position, feature, value)
