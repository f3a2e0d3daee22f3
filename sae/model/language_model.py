"""The way to the model: read, replace and skip its sites, in one forward pass or in generation.

1. `LanguageModel` wraps a Hugging Face model and finds its sites; `sae.model.load.load_model` makes and checks one.
2. `run` makes one forward pass under one nnsight trace; where the model is elsewhere `sae.model.remote` does. At each
   site, in order, the module is skipped or its tensor x [B, S, d] is read, edited and written back, and kept if asked.
3. Gradients need no backward inside the trace: a leaf planted at the embedding makes the graph, which outlives it.
4. `resume_from` gives the tensors that let a run start at a site, from activations that were kept before.
5. `generate` applies edits at every step with forward hooks, which cost less per token than a trace.
6. `edited` lets edits stand for a `with` block; in one of `frozen_attention` heads look where they look without edits.

Examples do not interact, so a batch may hold n copies of the same prompts with different edits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from sae.errors import UserError
from sae.model import forward
from sae.model.activation_checkpointing import Checkpointed
from sae.model.attention import as_unedited, check_can_freeze
from sae.model.device_map import home_device
from sae.model.forward import Run
from sae.model.generation import generate
from sae.model.hook_points import Columns, HookPoint, SiteEdit, StandingEdit, after_standing, chained, edited
from sae.model.huggingface import evaluation_mode, fingerprints, max_positions, stored_fingerprints
from sae.model.remote import Server
from sae.model.site_handles import (
    ReadPoints,
    base_path,
    containment,
    default_paths,
    direct_parents,
    envoy_of,
    first_pass,
    hidden_by,
    input_embeddings,
    is_parallel,
    left_out,
    make_hook_point,
    no_site,
    read_points,
)
from sae.model.sites import READ_KINDS, Site, SitePath, site_table
from sae.model.tokens import TokenizerWrapper, Tokens
from sae.model.tracing import handles, trace


class LanguageModel:
    """A decoder whose sites can be read, replaced and skipped; parameters are frozen and never change."""

    def __init__(
        self,
        hf: Any,
        tokenizer: Any,
        *,
        name: str,
        site_paths: Mapping[str, str | SitePath] | None = None,
        stored_as: tuple[str, ...] | None = None,
        server: Server | None = None,
    ) -> None:
        self._hf: Any = hf
        self.server = server  # the model elsewhere that runs are asked of; None where it is in this process
        self.checkpointed: Checkpointed | None = None  # see `Checkpointed.of`
        self.name = name
        self.fingerprints: tuple[str, ...] = stored_as or fingerprints(hf)
        self.default_paths = default_paths(hf, name)
        self.site_paths = site_table(hf, site_paths, self.default_paths)
        self.sites: tuple[Site, ...] = tuple(self.site_paths)
        self.n_layers = 1 + max((site.layer for site in self.sites if site.layer is not None), default=-1)
        self._coder = None if tokenizer is None else TokenizerWrapper(tokenizer)
        if self._coder is not None and self._coder.pad_id >= hf.get_input_embeddings().weight.shape[0]:
            self._coder.pad_id = 0  # added to the tokenizer and not to the model: any id serves under the mask
        self._lock = threading.RLock()
        self._standing: list[Mapping[Site, StandingEdit]] = []
        self._is_frozen = False
        self._root = handles(hf) if server is None else server.root
        self._base = envoy_of(self._root, base) if (base := base_path(hf, self.site_paths)) else self._root
        self._contains = containment(self.site_paths)
        self._hook_points = {site: make_hook_point(self._root, site, path) for site, path in self.site_paths.items()}
        self._leaf = self._hook_points.get(Site("embed")) or input_embeddings(self._root)
        self.has_gradients = True
        """Whether gradients reach the logits from the first site: not where modules have no backward pass."""
        self.padding_shows = False
        """Whether padding before a text changes what the model makes of it, as in recurrent models."""
        tokens = self.probe_tokens()
        if server is None:
            shown = first_pass(name, hf, self._hook_points, partial(self._trace, tokens), rows=len(tokens))
        else:
            shown = server.first_pass(self._hook_points, tokens)
        self._hook_points = shown.hook_points
        self._leaf = self._hook_points.get(Site("embed"), self._leaf)
        self.widths, self.vocab_size, self.d_model = shown.widths, shown.vocab_size, shown.d_model
        self.parallel_blocks = is_parallel(self)

    @property
    def hf(self) -> Any:
        """The Hugging Face model; UserError where it is elsewhere."""
        if self.server is not None:
            raise self.server.refusal
        return self._hf

    @property
    def architecture(self) -> nn.Module:
        """The modules and the config; without weights where the model is elsewhere."""
        return self._hf

    @property
    def fingerprint(self) -> str:
        """A short hash of the model, the same in every number type it is loaded in."""
        return self.fingerprints[0]

    def is_model(self, fingerprint: str) -> bool:
        """Whether a fingerprint in the records of a run is this model's, in float16 or in any other number type."""
        if fingerprint not in self.fingerprints and self.dtype == torch.float16:
            self.fingerprints = (*self.fingerprints, *stored_fingerprints(self.name, self.fingerprints))
        return fingerprint in self.fingerprints

    @property
    def moved_sites(self) -> dict[Site, str]:
        """Sites that are not where the architecture has them, by the path that was given for them."""
        return {site: str(path) for site, path in self.site_paths.items() if path != self.default_paths.get(site)}

    def reads_at(self, site: Site, path: str) -> bool:
        """Whether it reads a site where an earlier run did, by the path in its records; empty where it was usual."""
        return path in (self.moved_sites.get(site, ""), str(self.site_paths[site]))

    @property
    def tokenizer(self) -> Any:
        """The model's own copy of the tokenizer."""
        return self.text_coder.tokenizer

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokenizer's special tokens; none without a tokenizer."""
        return self._coder.special_ids if self._coder is not None else frozenset()

    @property
    def device(self) -> torch.device:
        """The device of token ids and activations: where the first parameter is used."""
        return home_device(self._hf) if self.server is None else torch.device("cpu")

    def device_of(self, site: Site) -> torch.device:
        """The device of the layer that a site is in."""
        return self._point(site).away or self.device

    @property
    def revision(self) -> str | None:
        """Commit of the hub's repository that it was loaded from; None for a folder or an object."""
        return getattr(getattr(self._hf, "config", None), "_commit_hash", None)

    @property
    def max_positions(self) -> int | None:
        """Most tokens of one text; None where nothing in the model's config bounds it."""
        return max_positions(self._hf)

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the activations."""
        return next(self._hf.parameters()).dtype if self.server is None else self.server.dtype

    def tokenize(self, texts: Sequence[str], *, max_length: int | None = None) -> Tokens:
        """A left-padded batch on the model's device, with the special tokens the tokenizer itself adds."""
        tokens = self.text_coder.encode(texts, max_length=max_length)
        n_known = self._hf.get_input_embeddings().weight.shape[0]
        if (largest := int(tokens.input_ids.max())) >= n_known:
            raise UserError(
                f"the tokenizer gives token {largest}, model {self.name!r} knows {n_known}: they do not belong together"
            )
        return tokens.to(self.device)

    def tokenize_prompts(self, texts: Sequence[str]) -> Tokens:
        """A left-padded batch of prompts, with special tokens in front alone: the last token is the prompt's own."""
        return Tokens.from_rows(self.text_coder.prompt_ids(texts), pad_id=self.text_coder.pad_id).to(self.device)

    def token_strings(self, ids: Iterable[int] | Tensor) -> list[str]:
        """The text each token adds to a sentence: " he", not "Ġhe"; "#17" where the model has no tokenizer."""
        if self._coder is None:
            return [f"#{id}" for id in (ids.tolist() if isinstance(ids, Tensor) else ids)]
        return self._coder.strings(ids)

    def run(
        self,
        tokens: Tokens,
        *,
        capture: Iterable[Site] = (),
        edits: Mapping[Site, SiteEdit] | None = None,
        skip: Mapping[Site, Tensor] | None = None,
        grad: bool = False,
        last_only: bool = False,
        need_logits: bool = True,
    ) -> Run:
        """One forward pass of the batch.

        `edits` map a site's x [B, S, d] to its replacement; `capture` gives tensors after the edit. `skip` gives the
        output of a site's module, which then does not run: skipping `resid_l` skips block l whole, and sites inside it
        can be neither captured nor edited. A skip tensor of fewer rows is repeated to the batch, copies in order.
        With `grad` the graph outlives the run and starts at a leaf planted at the embedding, unless a skip tensor
        requires a gradient already; else nothing is recorded. `last_only` unembeds the last position alone, and runs
        the last block's MLP there alone where nothing else of it is asked for; without `need_logits` neither the head
        runs nor the blocks after the last site that was asked for.

        The model is put into evaluation mode whenever it is found in another. Where padding shows (a recurrent state
        that runs over it, positions scaled by the longest) rows of equal length run together; with edits, skips or
        gradients all must be.
        """
        evaluation_mode(self._hf)
        if grad and not self.has_gradients:
            raise UserError(
                f"no gradient reaches the logits of model {self.name!r}: modules have no backward pass, as quantised "
                "ones may have; load it in float32 or bfloat16, or use the method exact"
            )
        edits, skip, captured = dict(edits or {}), dict(skip or {}), set(capture)
        self._check_requested(edits, captured, skip)

        def run_rows(rows: Tokens) -> Run:
            with self._attention_of(rows, edits, skip):
                return self._run(rows, captured, edits, skip, grad=grad, last_only=last_only, need_logits=need_logits)

        if (refusal := forward.unequal_lengths(self, tokens)) is None:
            return run_rows(tokens)
        if edits or skip or grad:
            raise refusal
        return forward.run_by_length(tokens, run_rows)

    def _run(
        self, tokens: Tokens, captured: set[Site], edits: Mapping[Site, SiteEdit], skip: Mapping[Site, Tensor], *,
        grad: bool = False, last_only: bool = False, need_logits: bool = True, unedited: bool = False,
    ) -> Run:  # fmt: skip
        """One trace, or a server's run: the visits to the sites asked for; `unedited`: without standing edits."""
        hidden, options = hidden_by(skip, self._contains), {"last_only": last_only, "need_logits": need_logits}
        with self._lock:
            standing = {} if unedited else chained(self._standing)
        standing = {site: edit for site, edit in standing.items() if site not in {*hidden, *skip}}
        edits = after_standing(standing, edits, Columns(tokens.to(self.device), 0, tokens.n_positions))
        values = forward.fitted({site: x for site, x in skip.items() if site not in hidden}, self, rows=len(tokens))
        if (runner := (self.checkpointed if grad else None) or self.server) is not None:
            return runner.run(self, tokens, captured, edits, values, grad=grad, **options)
        leaf = self._leaf if grad and not any(x.requires_grad for x in values.values()) else None
        points = [self._point(site) for site in sorted({*captured, *edits, *values}, key=self._when)]
        if leaf is not None and leaf not in points:
            points.insert(0, leaf)
        activations: dict[Site, Tensor] = {}

        def visit(point: HookPoint) -> None:
            site = point.site
            unedited = values[site] if site in values else point.read(len(tokens))
            x = unedited.detach().requires_grad_(True) if point is leaf else unedited
            x = edited(x, edits[site], site) if site in edits else x
            if site in values:
                point.skip(x)
            elif not point.read_only and (x is not unedited or (point.detour and (grad or point.in_place))):
                point.write(x)
            if site in captured:
                activations[site] = x

        visits: list[Callable[[], None]] = [partial(visit, point) for point in points]
        visits += left_out(points, self._hook_points, self._contains, {*captured, *edits, *skip}, **options)
        logits = self._trace(tokens, visits, grad=grad, **options)
        return Run(activations, logits)

    @contextmanager
    def edited(self, edits: Mapping[Site, StandingEdit]) -> Iterator[None]:
        """Every run and generation has these edits while the context lasts, after those of contexts around it.

        An edit gets x [B, n, d] and its `Columns`. A site whose output is skipped is not edited; other threads wait.
        """
        self._check_requested(edits)
        with self._lock:
            self._standing.append(edits)
            try:
                yield
            finally:
                self._standing.pop()

    @contextmanager
    def frozen_attention(self) -> Iterator[None]:
        """Edited runs, and prompts of generations, attend in this context as the same text does without edits."""
        check_can_freeze(self)
        with self._lock:
            before, self._is_frozen = self._is_frozen, True
            try:
                yield
            finally:
                self._is_frozen = before

    def _attention_of(
        self, tokens: Tokens, edits: Mapping[Site, SiteEdit], skip: Mapping[Site, Tensor]
    ) -> AbstractContextManager[None]:
        """Attention of a run without edits, where it is frozen and edits are about to follow."""
        run = partial(self._run, tokens, set(), {}, skip, unedited=True)
        return as_unedited(self.hf, run) if self._is_frozen and (edits or self._standing) else nullcontext()

    def resume_from(self, site: Site, cache: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        """The `skip` mapping with which a run starts at `site`: what comes before it is taken from `cache`.

        Blocks before the site's layer are skipped whole, the earlier sublayers of its own block one by one, and for
        attention the MLP that runs beside it. Only the last block skipped is read by what follows. What the cache lacks
        is computed again.
        """
        return {skipped: cache[parent] for skipped, parent in self.parents(site, cache).items()}

    def parents(self, site: Site, cached: Container[Site]) -> dict[Site, Site]:
        """Each site that a run from `site` on skips -> the cached site that stands for it: the direct parents of `site`
        are the values.
        """
        return direct_parents(self.sites, site, cached, parallel_blocks=self.parallel_blocks)

    def generate(
        self,
        prompts: Tokens,
        *,
        max_new_tokens: int,
        edits: Mapping[Site, SiteEdit] | None = None,
        later_edits: Mapping[Site, SiteEdit] | None = None,
        **sampling: Any,
    ) -> Tensor:
        """[B, S + new] token ids; greedy, whatever the checkpoint's generation settings, unless `sampling` (arguments
        of Hugging Face's generate) says otherwise.

        Edits apply at every step: `edits` see x [B, S, d] of the prompts' positions alone, `later_edits` (the same
        unless given; an empty mapping for none) x [B, 1, d] of each later token.
        """
        edits = dict(edits or {})
        later = edits if later_edits is None else dict(later_edits)
        self._check_requested({**edits, **later})
        pad_id = self._coder.pad_id if self._coder else 0
        evaluation_mode(self.hf)
        with self._lock, self._attention_of(prompts, {**edits, **later}, {}):
            return generate(
                self, prompts.to(self.device), max_new_tokens=max_new_tokens, pad_id=pad_id, edits=edits,
                later_edits=later, standing=chained(self._standing), sampling=sampling,
            )  # fmt: skip

    def hooked(self, site: Site, edit: SiteEdit, *, rows: int) -> AbstractContextManager[None]:
        """Apply the edit at every call of the site's module while the context lasts, outside of `run`."""
        evaluation_mode(self.hf)
        return self._point(site).hooked(edit, rows=rows)

    @cached_property
    def reads(self) -> ReadPoints:
        """The places at which transcoders may read, measured when one is first asked for."""
        evaluation_mode(self.hf)
        with self._lock, forward.outside_inference_mode(), torch.no_grad():
            return read_points(self._root, self._hook_points, self.probe_tokens())

    def read_width(self, site: Site) -> int:
        """Width of a site, or of a place that is read only."""
        return self.reads.widths[self._point(site).site] if site.kind in READ_KINDS else self.widths[site]

    def _point(self, site: Site) -> HookPoint:
        """The hook point of a site or of a place that is read only; UserError where the model has none."""
        points = self.reads.points if site.kind in READ_KINDS else self._hook_points
        if site not in points:
            raise no_site(site, self.sites, points)
        return points[site]

    def _when(self, site: Site) -> tuple[int, float]:
        """Sorts sites and read places as the forward pass comes to them."""
        layer, order = site.order
        return layer, 0.0 if site.kind in READ_KINDS and site in self.reads.early else order

    def _trace(
        self, tokens: Tokens, visits: Iterable[Callable[[], None]], *, grad: bool = False, last_only: bool = False,
        need_logits: bool = True,
    ) -> Tensor:  # fmt: skip
        """Make the visits, which are in forward order, in one run, and return the logits; none are empty."""
        root = self._root if need_logits else self._base
        inputs = forward.forward_inputs(root._module, tokens.to(self.device), last_only=last_only)
        with self._lock, forward.outside_inference_mode(), torch.set_grad_enabled(grad):
            logits = trace(root, inputs, visits, need_logits=need_logits)
        return logits[:, -1:] if last_only and need_logits else logits

    def _check_requested(
        self, edits: Iterable[Site], captured: Iterable[Site] = (), skip: Mapping[Site, Tensor] | None = None
    ) -> None:
        for site in [*captured, *edits, *(skip or {})]:
            self._point(site)
        if unreachable := sorted(hidden_by(skip or {}, self._contains) & {*captured, *edits}):
            raise UserError(f"site {str(unreachable[0])!r} is inside a skipped block: it cannot be captured or edited")

    @property
    def text_coder(self) -> TokenizerWrapper:
        """Texts and prompts to token ids; UserError for a model without a tokenizer."""
        if self._coder is None:
            raise UserError(f"model {self.name!r} came without a tokenizer: give one with tokenizer=")
        return self._coder

    def probe_tokens(self) -> Tokens:
        """A few random tokens, the same every time."""
        return forward.probe_tokens(self._hf).to(self.device)
