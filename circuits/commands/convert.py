"""`sfc convert`: autoencoders of any known format in our own, SAELens' or dictionary_learning's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from circuits.commands.common import Output, Overwrite
from sae.files import prepare_folder
from sae.formats import load_any, save_saes


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write autoencoders in another format, with the same reconstructions: a folder a site."""

    saes: str
    """Autoencoders: a run folder, a folder or file of any known format, or owner/repository/folder on the hub."""
    out: Path
    """Folder; an autoencoder goes to SITE inside."""
    format: Literal["ours", "saelens", "dictionary_learning"]
    """Format to write."""
    site: str | None = None
    """Site of a single autoencoder whose files do not say it."""
    overwrite: Overwrite = False
    json: bool = False
    """Print one JSON object instead of text."""

    def run(self) -> Output:
        saes = load_any(self.saes, sites=None if self.site is None else [self.site])
        prepare_folder(self.out, overwrite=self.overwrite)
        save_saes({self.out / site.name: sae for site, sae in saes.items()}, file_format=self.format)
        names = [site.name for site in saes]
        text = f"wrote {', '.join(names)} to {self.out} as {self.format}"
        return Output(text, {"out": str(self.out), "format": self.format, "sites": names})
