"""`sfc cache`: activations of a model on disk, for several trainings; and how other commands read them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from circuits.cli.options import Common, HasModel, HasSites, HasText, Output, Overwrites
from sae._options import ContextLength, TokenCount

if TYPE_CHECKING:
    from sae.data.cache import CachedActivations


@dataclass(frozen=True, kw_only=True)
class CacheCommand(Common, Overwrites, HasSites, HasText, HasModel):
    """Write the activations of a model to disk once, for `sfc train --cache` and `sfc sweep --cache`; for transcoders
    with what they read: `--sites all,mlp_in`.
    """

    out: Path
    """Folder of the cache."""
    tokens: TokenCount = 2_000_000
    """Tokens written, special ones not counted; fewer where the text ends before."""
    stored_dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Number type on disk."""
    context_length: ContextLength | None = None
    """Longest context, in tokens, that the model reads text in; 128, or less if the model takes less, by default."""
    packed: bool = False
    """Pack documents end to end into full contexts instead of one context a document."""
    resume: bool = False
    """Go on after the last whole shard of an interrupted run with the same options."""

    def run(self) -> Output:
        from circuits.cli.common import load_model
        from sae.data.cache import bytes_text
        from sae.data.cache_writer import cache_bytes, select_places, write_cache

        model = load_model(self.model, self)
        sites = select_places(model, self.sites)
        size = cache_bytes(map(model.read_width, sites), self.tokens, self.stored_dtype)
        if not self.quiet:
            sys.stderr.write(f"{self.tokens:,} tokens at {len(sites)} sites: {bytes_text(size)} on disk\n")
        manifest = write_cache(
            model,
            self.text,
            sites=self.sites,
            tokens=self.tokens,
            out=self.out,
            context_length=self.context_length,
            packed=self.packed,
            dtype=self.stored_dtype,
            resume=self.resume,
            overwrite=self.overwrite,
            progress=not self.quiet,
        )
        written = sum(path.stat().st_size for path in self.out.glob("shard_*"))
        short = f"; the text has no more than {manifest.rows:,} tokens" if manifest.rows < self.tokens else ""
        text = (
            f"wrote {self.out}: {manifest.rows:,} tokens of {manifest.documents:,} documents at "
            f"{len(manifest.sites)} sites, {bytes_text(written)} in {len(manifest.shards)} shards{short}"
        )
        data = {"out": str(self.out), "tokens": manifest.rows, "documents": manifest.documents, "bytes": written}
        return Output(text, {**data, "sites": list(manifest.sites)})


def open_cache(folder: Path, *, model: str | None, text: str | None, sites: str, device: str) -> CachedActivations:
    """The cache of a training; a model or text that is given as well must be the one it was made for.

    Of the model, no more than the weights' fingerprint is looked at.
    """
    from sae.data.cache import CachedActivations, CachedModel
    from sae.model.huggingface import resolve_device, weights_fingerprint

    on = resolve_device(device)
    facts = None if model is None else CachedModel(model, weights_fingerprint(model), {}, on)
    return CachedActivations(folder, model=facts, text=text, sites=sites, device=on)
