"""`sfc saes`: released dictionaries that `--saes` loads by name."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from circuits.cli.options import Output, Prints


@dataclass(frozen=True, kw_only=True)
class SaesCommand(Prints):
    """List released sets of autoencoders and transcoders: the name for --saes, the model, the sites, where they are."""

    model: str | None = None
    """Only those of models with this in their name, such as gemma-3."""

    def run(self) -> Output:
        from sae.errors import unknown
        from sae.formats.releases import releases

        wanted = (self.model or "").lower()
        rows = [release for release in releases().values() if wanted in release.model.lower()]
        if not rows:
            raise unknown("model", str(self.model), sorted({release.model for release in releases().values()}))
        wide = max(len(release.name) for release in rows)
        lines = [f"{row.name:<{wide}}  {row.model}: {row.sites}  ({row.reader}, {row.source})" for row in rows]
        return Output("\n".join(lines), {"releases": [asdict(row) for row in rows]})
