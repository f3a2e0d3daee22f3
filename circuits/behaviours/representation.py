"""Represent contexts by vectors, so that contexts predicted in the same way are near each other.

With m = -log p(answer | context) and the patch state zero (there is no other prompt), each context is a vector over
(feature, last token or any earlier one), one of

- `effects`: the effects of features on m by attribution patching, -f_i (W_dec[i] . dm/dx) added up over tokens (Marks
  et al. 2024, sections 3.1 and 5); those below zero, of features that stand against the answer, count as zero,
- `activations`: f_i added up over tokens,
- `gradients`: dm/dx at the last token of every site, a vector over the model's widths (Michaud et al. 2023 take that of
  the weights).

A few features carry most of an effect; v -> sqrt(v) lets the others speak, and vectors have unit length, so that it
does not matter how surely something is predicted. Errors are left out: they are no features. On the bundled grammar
each of these steps brings clusters nearer to its rules (`tests/benchmarks/bench_behaviours.py`).

Legend: B contexts of a batch, N of all, F features of a site, n entries that are not zero.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.preprocessing import normalize
from torch import Tensor

from circuits.attribution.activations import ActivationPair, Setting, capture_activations
from circuits.attribution.effects import SiteEffects, to_sparse, token_indices
from circuits.attribution.node_effects import attribute_batches
from circuits.behaviours.options import BehaviourSearchOptions, Represent
from circuits.discovery.batching import MOST_ROWS, max_rows
from circuits.discovery.resume import ResumeFolder
from circuits.options import MethodOptions
from circuits.prompts.dataset import PromptSet
from sae._progress import ProgressBar
from sae.model.forward import with_gradients
from sae.model.sites import Site


@with_gradients
def context_vectors(
    setting: Setting,
    prompts: PromptSet,
    options: BehaviourSearchOptions,
    *,
    files: ResumeFolder | None = None,
    progress: bool = True,
) -> sp.csr_matrix:
    """One unit vector a context, [N, D] sparse.

    Args:
        setting: model, SAEs and the metric log_probability.
        prompts: N contexts with their answers.
        options: the representation, and the memory that batches are cut to.
        files: where finished batches are kept, and taken from where they are there.
        progress: whether a progress bar is shown.
    """
    rows = max_rows(setting.model, prompts.clean.n_positions, memory=options.memory)
    order = prompts.clean.lengths.argsort(stable=True).cpu()
    batches = order.split(max(1, min(rows, MOST_ROWS)))
    of_batches = []
    with ProgressBar(total=len(batches), desc=f"contexts ({options.represent})", disable=not progress) as bar:
        for number, index in enumerate(batches):
            name = f"nodes-{number:04}"
            tensors = None if files is None else files.get(name)
            if tensors is None:
                tensors = _entries(setting, prompts[index], options.represent)
                if files is not None:
                    files.put(name, tensors)
            shape = (len(index), int(tensors["width"]))
            entries = (tensors["value"].numpy(), (tensors["row"].numpy(), tensors["column"].numpy()))
            of_batches.append(sp.csr_matrix(entries, shape=shape))
            bar.update()
    vectors = sp.vstack(of_batches).tocsr()[np.argsort(order.numpy())]  # back in the order of the contexts
    if options.represent != "gradients":
        vectors = vectors.maximum(0).sqrt()
    return normalize(vectors)


def _entries(setting: Setting, batch: PromptSet, represent: Represent) -> dict[str, Tensor]:
    """The entries of a batch that are not zero: row, column and value [n], and the number of columns."""
    states = capture_activations(setting, batch, gradient=represent != "activations")
    if represent == "gradients":
        assert states.gradients is not None
        last = torch.cat([gradient[:, -1].float().cpu() for gradient in states.gradients.values()], dim=1)  # [B, D]
        row, column = last.nonzero(as_tuple=True)
        return {"row": row, "column": column, "value": last[row, column], "width": torch.tensor(last.shape[1])}
    if represent == "effects":
        effects = attribute_batches([states], MethodOptions(method="attrib"), totals=False)[0].effects
    else:
        effects = {site: _activations(states, site) for site in states.sites}
    rows, columns, values, width = [], [], [], 0
    for of_site in effects.values():
        is_feature = of_site.feature < of_site.n_features
        is_last = of_site.position == states.tokens.lengths.cpu()[of_site.example.long()] - 1
        rows.append(of_site.example[is_feature])
        columns.append((width + of_site.feature.long() + of_site.n_features * is_last)[is_feature])
        values.append(of_site.value[is_feature])
        width += 2 * of_site.n_features
    return {
        "row": torch.cat(rows), "column": torch.cat(columns), "value": torch.cat(values), "width": torch.tensor(width),
    }  # fmt: skip


def _activations(states: ActivationPair, site: Site) -> SiteEffects:
    """Activations of the features of a site as if they were effects."""
    sae, mask = states.setting.saes[site], states.mask
    x = states.of_site(site).read_clean[mask]
    f = sae.encode(x.to(sae.W_dec))
    return to_sparse(sae, token_indices(mask, mask), f, f.new_zeros(len(f)))
