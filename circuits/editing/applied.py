"""Edits at work in a model: `edited` for runs and generation, and the numbers that edits refer to.

1. `with_references` measures what an edit refers to (means, largest activations, values to draw) where it does not say:
   on text where there is some, else on the prompts; of features at a span, at the tokens of that span.
2. `FeatureEdits` makes of edits what each site has to do; called with prompts, it gives the edits of a run of these.
3. `edited` lets them stand for every run and generation of a `with` block: padded batches, with and without a cache.

Shapes: B prompts, S positions, n columns, m edited features of a site, R draws.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from circuits.editing.declaration import Edit, load_edits
from circuits.editing.site_edit import FeatureReader, Part, SiteEdits
from circuits.editing.targets import EVERYWHERE, GENERATED, Features, counted_inputs, tokens_at
from circuits.editing.template_means import MeansByPlace, TemplateMeans
from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SparseAutoencoder
from sae.data.batches import token_batches
from sae.errors import UserError
from sae.model.hook_points import Columns, SiteEdit, StandingEdit, with_read
from sae.model.language_model import LanguageModel, Tokens
from sae.model.sites import Site
from sae.saes import as_saes
from sae.splice import ensure_checked

DRAWS = 64
"""Values of a feature that are kept for `resample`."""
BATCH_SIZE = 64


@contextmanager
def edited(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    edits: Edit | Sequence[Edit] | str | Path,
    *,
    prompts: PromptSet | None = None,
    texts: Sequence[str] = (),
) -> Iterator[None]:
    """Edit the model for every run and generation of a `with` block; blocks inside edit what those around them left.

    Args:
        model: The model.
        saes: SAEs of the edited features' sites.
        edits: What is edited, or a file that `load_edits` reads. Edits of one block read the same activations.
        prompts: Prompts whose spans and templates the edits name; other texts have none. Also what means, largest
            activations and draws are taken from where the edits do not say them and there are no texts.
        texts: Text that these are taken from.

    Returns:
        A context manager; when the block ends the model is as it was before, also after an error.

    Raises:
        UserError: For a feature that is not there, or an edit that refers to what it does not say.
    """
    listed = load_edits(edits) if isinstance(edits, str | Path) else [edits] if isinstance(edits, Edit) else list(edits)
    ensure_checked(
        model, saes, {site for edit in listed for of_span in edit.by_span(saes).values() for site in of_span}
    )
    batches = list(token_batches(model, sorted(texts, key=len), max_tokens=None, batch_size=16)) if texts else []
    resolved = [with_references(model, saes, edit, prompts=prompts, texts=batches) for edit in listed]
    standing = FeatureEdits(model, saes, resolved, prompts=prompts).standing(prompts)
    with model.edited(standing), frozen(model, listed):
        yield


def frozen(model: LanguageModel, edits: Iterable[Edit]) -> AbstractContextManager[None]:
    """Attention that does not follow edits, where one of them says so."""
    return model.frozen_attention() if any(edit.freeze == "attention" for edit in edits) else nullcontext()


# ------------------------------------------------------------------------------------------ what edits refer to


def with_references(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    edit: Edit,
    *,
    prompts: PromptSet | None = None,
    texts: Sequence[Tokens] = (),
    seed: int = 0,
) -> Edit:
    """The edit with what it refers to, measured where it does not say it. texts: batches of text."""
    lacking = [name for name in edit.listed(saes) if name not in edit.reference]
    if edit.refers is None or not lacking:
        return edit
    if prompts is None and not texts:
        raise UserError(
            f"the {edit.refers} of {lacking[0]} is not known: write it into the edit's reference, give prompts or text"
        )
    measured: dict[str, float | Sequence[float]] = {}
    for span, features in edit.by_span(saes).items():
        at_span = span not in (EVERYWHERE, GENERATED)
        if at_span and prompts is None:
            raise UserError(f"the {edit.refers} at {span!r} is measured on prompts: give them")
        on_prompts = prompts is not None and (at_span or not texts)
        batches = list(prompts.batches(BATCH_SIZE)) if prompts is not None and on_prompts else []
        tokens = [batch.clean for batch in batches] if on_prompts else texts
        where = [tokens_at(batch, span) for batch in batches] if on_prompts else None
        values = feature_reference(model, saes, features, tokens, where=where, kind=edit.refers, seed=seed)
        suffix = f"@{span}" if span else ""
        for site, of_site in values.items():
            numbers = zip(features[site].tolist(), of_site.movedim(-1, 0).tolist(), strict=True)  # [R, m] -> m rows
            measured |= {f"{site}/{index}{suffix}": number for index, number in numbers}
    return replace(edit, reference={**measured, **edit.reference})


@torch.no_grad()
def feature_reference(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    features: Features,
    batches: Sequence[Tokens],
    *,
    kind: str = "mean",
    where: Sequence[Tensor] | None = None,
    seed: int = 0,
) -> dict[Site, Tensor]:
    """The `mean` [m] or `largest` activation [m] of each chosen feature, or `draws` [R, m], a few tokens' values, over
    all tokens (special tokens aside) of the batches, or those of `where` ([B, S] bool each).
    """
    readers = {site: FeatureReader(saes[site], index) for site, index in features.items()}
    sums = {site: torch.zeros(len(index), device=as_saes(saes).device) for site, index in features.items()}
    draws: dict[Site, list[Tensor]] = {site: [] for site in features}
    generator, n_tokens = torch.Generator().manual_seed(seed), 0
    masks: Sequence[Tensor | None] = where or [None] * len(batches)
    for tokens, mask in zip(batches, masks, strict=True):
        activations = counted_inputs(model, tokens, as_saes(saes).read_sites(features), mask)
        n_of_batch = len(next(iter(activations.values())))
        n_tokens += n_of_batch
        order = torch.randperm(n_of_batch, generator=generator)
        for site, x in activations.items():
            f = readers[site](x)  # [N, m]
            if kind == "mean":
                sums[site] += f.sum(0)
            elif kind == "largest" and len(f):
                sums[site] = torch.maximum(sums[site], f.amax(0))
            elif kind == "draws":
                draws[site].append(f[order[:DRAWS].to(f.device)])
    if kind == "draws":
        keep = torch.randperm(min(n_tokens, DRAWS * len(batches)), generator=generator)
        return {site: torch.cat(drawn)[keep[keep < sum(map(len, drawn))][:DRAWS]] for site, drawn in draws.items()}
    return {site: total / max(n_tokens, 1) if kind == "mean" else total for site, total in sums.items()}


def feature_means(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    features: Features,
    batches: Sequence[Tokens],
    *,
    where: Sequence[Tensor] | None = None,
) -> dict[Site, Tensor]:
    """Mean of each chosen feature over tokens as in `feature_reference`: [m] by site."""
    return feature_reference(model, saes, features, batches, where=where)


# ------------------------------------------------------------------------------------------ edits by site


class FeatureEdits:
    """The edits of every site; called with prompts, those of a run of these for `LanguageModel.run`."""

    def __init__(
        self,
        model: LanguageModel,
        saes: Mapping[Site, SparseAutoencoder],
        edits: Sequence[Edit],
        *,
        prompts: PromptSet | None = None,
        means: MeansByPlace | None = None,
        strength: float = 1.0,
        seed: int = 0,
    ) -> None:
        """`edits` say what they refer to; those by template need the prompts that means are taken over, or `means` of
        these that other edits use as well.
        """
        by_site: dict[Site, list[Part]] = {}
        means = MeansByPlace(model, saes, prompts) if means is None and prompts is not None else means
        for edit in edits:
            for span, features in edit.by_span(saes).items():
                _check_span(span, prompts)
                by_place = edit.by_template and span == EVERYWHERE
                tables = means.of(features) if by_place and means is not None else {}
                for site, index in features.items():
                    target = _target(edit, site, span, index, as_saes(saes).device)
                    part = Part(
                        index, edit.operation, target, tables.get(site), span, edit.where, tuple(edit.schedule),
                        strength * edit.strength, seed,
                    )  # fmt: skip
                    by_site.setdefault(site, []).append(part)
        self.sites = {site: SiteEdits(saes[site], of_site) for site, of_site in by_site.items()}
        self.reads = as_saes(saes).read_sites(by_site)

    def __bool__(self) -> bool:
        return bool(self.sites)

    def __call__(self, prompts: PromptSet) -> dict[Site, SiteEdit]:
        """Edits for `LanguageModel.run` of the clean prompts."""
        columns = Columns(prompts.clean, 0, prompts.clean.n_positions)
        now = {site for site, edits in self.sites.items() if any(p.in_time(columns) is not None for p in edits.parts)}
        return placed(self._standing(now, prompts), prompts)

    def standing(self, prompts: PromptSet | None = None) -> dict[Site, StandingEdit]:
        """Edits for `LanguageModel.edited`; a text that is none of the prompts has no spans and no templates."""
        return self._standing(self.sites, prompts)

    def _standing(self, sites: Iterable[Site], prompts: PromptSet | None) -> dict[Site, StandingEdit]:
        """The edits of some sites, and reads of the places that their dictionaries read."""
        lookup, standing = _Lookup(prompts), dict[Site, StandingEdit]()
        for site in sites:
            standing |= with_read(site, self.reads[site], _standing(self.sites[site], lookup))
        return standing


def _check_span(span: str, prompts: PromptSet | None) -> None:
    """`UserError` for a span that these prompts do not have."""
    if span not in (EVERYWHERE, GENERATED) and prompts is not None:
        tokens_at(prompts, span)
    elif span not in (EVERYWHERE, GENERATED) and not span.isdecimal():
        raise UserError(f"the span {span!r} is one of prompts: give them with prompts=")


def placed(edits: Mapping[Site, StandingEdit], prompts: PromptSet) -> dict[Site, SiteEdit]:
    """Standing edits as those of a run of the clean prompts."""
    columns = Columns(prompts.clean, 0, prompts.clean.n_positions)
    return {site: _at(edit, columns) for site, edit in edits.items()}


def _at(edit: StandingEdit, columns: Columns) -> SiteEdit:
    return lambda x: edit(x, columns)


def _standing(edits: SiteEdits, lookup: _Lookup) -> Callable[[Tensor, Tensor, Columns], Tensor]:
    return lambda x, x_read, columns: edits(x, x_read, columns, lookup)


def _target(edit: Edit, site: Site, span: str, index: Tensor, device: torch.device) -> Tensor | None:
    """The numbers that an operation refers to, on the SAEs' device."""
    value = None if edit.value is None else torch.tensor(float(edit.value), device=device)
    if edit.refers is None:
        return value
    names = [f"{site}/{feature}{'@' + span if span else ''}" for feature in index.tolist()]
    numbers = [edit.reference.get(name) for name in names]
    for name, number in zip(names, numbers, strict=True):
        if number is None or isinstance(number, Sequence) != (edit.refers == "draws"):
            expected = "a list of its values" if edit.refers == "draws" else f"its {edit.refers}"
            raise UserError(f"the reference of {name} is {number}: expected {expected}")
    lengths = {len(number) for number in numbers if isinstance(number, Sequence)}
    if len(lengths) > 1 or 0 in lengths:
        raise UserError(
            f"the values to draw of the features of {site} are {sorted(lengths)}: as many of each are needed"
        )
    target = torch.tensor(numbers, dtype=torch.float32, device=device)
    return target.movedim(0, -1) if edit.refers == "draws" else target if value is None else target * value


class _Lookup:
    """The spans and templates at the tokens of a batch, of the prompts that it holds, if any."""

    def __init__(self, prompts: PromptSet | None) -> None:
        self.prompts = prompts
        self._numbers: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)  # of the prompts with these ids
        self._batch: Tokens | None = None
        self._spans: dict[str, Tensor] = {}
        self._rows: Tensor = torch.empty(0, dtype=torch.int64)

    def inside(self, columns: Columns, span: str) -> Tensor:
        """[B, n] bool: which columns are tokens of a span, or at a position."""
        if span.isdecimal() and (self.prompts is None or span not in self.prompts.spans):
            inside = columns.positions == int(span)
            return inside & (torch.tensor(list(columns.steps), device=inside.device) < 0)
        self._look_up(columns.tokens)
        if span not in self._spans:
            self._spans[span] = self._spread(lambda prompts: tokens_at(prompts, span), fill=False)
        return self._cut(self._spans[span], columns, fill=False)

    def means(self, columns: Columns, part: Part) -> Tensor:
        """[B, n, m]: at tokens of the prompts the means of their place, elsewhere those of all tokens."""
        assert isinstance(part.table, TemplateMeans) and part.target is not None
        groups, table = part.table.groups, part.table.table
        self._look_up(columns.tokens)
        key = f"{id(groups)}"
        if key not in self._spans:
            self._spans[key] = self._spread(groups.of, fill=-1)
        group = self._cut(self._spans[key], columns, fill=-1)
        rows = torch.cat([table, part.target[None]])  # the last row where a token has no place
        return rows[group]

    def _look_up(self, tokens: Tokens) -> None:
        """Find each row of a batch among the prompts; once for every site and step of a batch. Of prompts with the same
        tokens, which may have other spans and templates, rows take one after the other.
        """
        if self._batch is not None and self._batch.input_ids is tokens.input_ids:
            return
        self._batch, self._spans = tokens, {}
        if self.prompts is not None and not self._numbers:
            for number, row in enumerate(_rows(self.prompts.clean)):
                self._numbers[row].append(number)
        seen: Counter[tuple[int, ...]] = Counter()
        numbers = []
        for row in _rows(tokens):
            same = self._numbers.get(row, [-1])
            numbers.append(same[seen[row] % len(same)])
            seen[row] += 1
        self._rows = torch.tensor(numbers)  # [B]

    def _spread(self, of: object, *, fill: int | bool) -> Tensor:
        """[B, S] of what `of` says of the prompts that are in the batch, `fill` elsewhere."""
        assert self._batch is not None and callable(of)
        listed = (self._rows >= 0).nonzero().flatten()
        table = torch.full(self._batch.input_ids.shape, fill, device=self._batch.input_ids.device)
        if len(listed) and self.prompts is not None:
            values = of(self.prompts[self._rows[listed]])  # [listed, S of theirs]
            table[listed.to(table.device), table.shape[1] - values.shape[1] :] = values.to(table)
        return table

    @staticmethod
    def _cut(table: Tensor, columns: Columns, *, fill: int | bool) -> Tensor:
        """The columns of a table [B, S], `fill` at generated tokens."""
        inside = table[:, columns.first : columns.first + columns.n]
        missing = columns.n - inside.shape[1]
        return torch.nn.functional.pad(inside, (0, missing), value=fill) if missing else inside


def _rows(tokens: Tokens) -> list[tuple[int, ...]]:
    """The ids of each row without padding."""
    ids, mask = tokens.input_ids.tolist(), tokens.attention_mask.tolist()
    return [tuple(i for i, real in zip(*row, strict=True) if real) for row in zip(ids, mask, strict=True)]
