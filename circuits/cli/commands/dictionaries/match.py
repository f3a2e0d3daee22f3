"""`sfc match`: which features are in two dictionaries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from circuits.cli.options import Common, HasSites, Output, Overwrites
from circuits.cli.results import output_file
from sae._files import write_json
from sae._frames import frame_text
from sae._options import Range, TokenCount
from sae._run.outputs import like
from sae.data.text import TextSource
from sae.errors import UserError

if TYPE_CHECKING:
    from sae.autoencoder import SparseAutoencoder
    from sae.features.matching import Match
    from sae.model.language_model import LanguageModel
    from sae.model.sites import Site

    Dictionaries = Mapping[Site, SparseAutoencoder]

KEYS = ("schema_version", "by", "threshold", "pairs")


@dataclass(frozen=True, kw_only=True)
class MatchCommand(Common, Overwrites, HasSites):
    """Find the same features in two dictionaries: site by site in two runs (other widths, seeds or architectures), or
    from each layer to the next in one run.
    """

    saes: str
    """Autoencoders whose features are looked for: a run folder, or any that can be loaded."""
    other: str | None = None
    """Autoencoders they are looked for in, at the same sites; the next layer's of --saes by default."""
    by: Literal["decoder", "activation"] = "decoder"
    """What makes features alike: decoder, the cosine of what they write; activation, the correlation of their
    activations over a text, which needs --model and --text.
    """
    model: str | None = None
    """The model that both belong to, where activations are compared."""
    text: str | None = None
    """The text over which activations are compared."""
    tokens: TokenCount = 50_000
    """Tokens that activations are compared on."""
    threshold: Annotated[float, Range(-1, 1)] = 0.7
    """Similarity from which on two features are one: mutual partners (same); a feature that two or more of the other
    dictionary are nearest to, by decoder, is split.
    """
    out: Path | None = None
    """JSON file for the partner of every feature; none by default."""

    def run(self) -> Output:
        if self.out is None:
            return self._run()
        with output_file(self.out, like(KEYS), overwrite=self.overwrite):
            return self._run()

    def _run(self) -> Output:
        import pandas as pd

        model = self._model()
        saes = self._load(self.saes, model)
        others = None if self.other is None else self._load(self.other, model)
        rows, entries = [], []
        for (site_a, a), (site_b, b) in pairs(saes, others, self.sites):
            match = self._match(model, (site_a, a), (site_b, b))
            entry = self._entry(match, a, b)
            entries.append({"feature_of": site_a.name, "partner_in": site_b.name, **entry, **_partners(match)})
            split = None if entry["split"] is None else len(entry["split"])
            rows.append({"feature of": site_a.name, "partner in": site_b.name, **entry, "split": split})
        text = frame_text(pd.DataFrame(rows), {"split": 0})
        data: dict[str, Any] = dict(zip(KEYS, (1, self.by, self.threshold, entries), strict=True))
        if self.out is not None:
            write_json(self.out, data)
            text += f"\nwrote {self.out}"
        return Output(text, data)

    def _model(self) -> LanguageModel | None:
        if self.by == "decoder":
            return None
        if self.model is None or self.text is None:
            raise UserError("matching by activation needs a model and a text: give --model and --text, or --by decoder")
        from circuits.cli.common import load_model

        return load_model(self.model, self)

    def _load(self, path: str, model: LanguageModel | None) -> Dictionaries:
        from circuits.cli.common import load_checked_saes
        from sae.model.huggingface import resolve_device
        from sae.saes import load_saes

        if model is None:
            return load_saes(path, device=resolve_device(self.device))
        return load_checked_saes(model, path)

    def _match(
        self, model: LanguageModel | None, a: tuple[Site, SparseAutoencoder], b: tuple[Site, SparseAutoencoder]
    ) -> Match:
        from sae.features.matching import match_by_activation, match_features

        if model is None:
            return match_features(a[1].W_dec, b[1].W_dec)
        assert self.text is not None
        return match_by_activation(model, a, b, TextSource.of(self.text).read(), max_tokens=self.tokens)

    def _entry(self, match: Match, a: SparseAutoencoder, b: SparseAutoencoder) -> dict[str, Any]:
        from sae.features.matching import persistent_features, split_features

        comparable = self.by == "decoder"
        split = split_features(a.W_dec, b.W_dec, threshold=self.threshold) if comparable else None
        return {
            "features": a.config.n_features,
            "partners": b.config.n_features,
            "similarity": match.mean,
            "mutual": float(match.mutual.double().mean()),
            "same": len(persistent_features(match, threshold=self.threshold)),
            "split": None if split is None else {str(feature): halves for feature, halves in split.items()},
        }


def _partners(match: Match) -> dict[str, list[Any]]:
    return {
        "partner": match.partner.tolist(),
        "partner_similarity": match.similarity.tolist(),
        "partner_mutual": match.mutual.tolist(),
    }


def pairs(
    saes: Dictionaries, others: Dictionaries | None, sites: str
) -> Iterator[tuple[tuple[Site, SparseAutoencoder], tuple[Site, SparseAutoencoder]]]:
    """The dictionaries to compare: at the same site of two runs, or at each site and the next of its kind."""
    from sae.model.sites import select_sites

    chosen = select_sites(sites, list(saes))
    if others is None:
        kinds = {site.kind: [other for other in chosen if other.kind == site.kind] for site in chosen}
        compared = [pair for members in kinds.values() for pair in pairwise(members)]
        why = "one run is compared from layer to layer, and no kind of site is there twice: give --other"
    else:
        compared = [(site, site) for site in chosen if site in others]
        why = f"none of {', '.join(map(str, chosen))} is among the other autoencoders: {', '.join(map(str, others))}"
    if not compared:
        raise UserError(f"no autoencoders to compare: {why}")
    for a, b in compared:
        yield (a, saes[a]), (b, (saes if others is None else others)[b])
