"""`sfc convert`: autoencoders of any known format in our own, SAELens' or dictionary_learning's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from circuits.cli.options import Output, Overwrites, Prints
from sae._files import prepare_folder, write_json
from sae._run.contents import (
    EVALUATION,
    RUN_CONFIG_FILE,
    Layout,
    check_contents,
    check_run_config,
    read_run_config,
    remove,
    visible,
)
from sae._run.locks import lock
from sae.errors import UserError

if TYPE_CHECKING:
    from sae.saes import SAEs

CONVERTED_SAE = Layout(
    (r"(config|cfg)\.json", r"(sae|sae_weights|layer_\d+)\.safetensors", r"ae\.pt", r"config\.yaml", EVALUATION)
)
"""The folder of a site, in any format that can be written."""
CONVERTED = Layout((r"config\.(json|yaml)", EVALUATION))


@dataclass(frozen=True, kw_only=True)
class ConvertCommand(Prints, Overwrites):
    """Write autoencoders in another format, with the same reconstructions: a folder a site."""

    saes: str
    """Autoencoders: a run folder, a folder or file of any known format, or owner/repository/folder on the hub."""
    out: Path
    """Folder; an autoencoder goes to SITE inside."""
    format: Literal["ours", "saelens", "dictionary_learning", "circuit_tracer"]
    """Format to write; circuit_tracer of transcoders alone, with a config.yaml that names all of them."""
    width: str | None = None
    """Of a set with several widths, such as Gemma Scope: how many features, 16k or 16384."""
    l0: str | None = None
    """Of a set with several sparsities: small, medium or big, or a number, of which the nearest is taken."""
    site: str | None = None
    """Site of a single autoencoder whose files do not say it."""
    read: Literal["mlp_resid", "mlp_norm", "mlp_in", "mlp_hidden"] | None = None
    """Place at which transcoders read, whatever their files say: the residual stream before the MLP's norm, normalised
    before its gain, after it, or the MLP's hidden neurons."""

    def run(self) -> Output:
        with lock(self.out):
            return self._run()

    def _run(self) -> Output:
        from sae.formats import save_saes
        from sae.formats.sets import with_choice
        from sae.saes import load_saes

        self._check()
        sites = None if self.site is None else [self.site]
        source = with_choice(self.saes, width=self.width, l0=self.l0)
        saes = load_saes(source, sites=sites, device="cpu", read=self.read)
        names = [site.name for site in saes]
        new = not self.out.exists() or not any(self.out.iterdir())
        self._remove_earlier()
        entry = {"saes": source, "format": self.format, "sites": names}
        self._note({**entry, "complete": False})
        try:
            save_saes({self.out / site.name: sae for site, sae in saes.items()}, file_format=self.format)
            if self.format == "circuit_tracer":
                self._write_set(saes)
        except UserError:
            if new:
                (self.out / RUN_CONFIG_FILE).unlink()
            raise
        self._note({**entry, "complete": True})
        text = f"wrote {', '.join(names)} to {self.out} as {self.format}"
        return Output(text, {"out": str(self.out), "format": self.format, "sites": names})

    def _write_set(self, saes: SAEs) -> None:
        """The `config.yaml` of all transcoders; circuit-tracer takes paths as they stand, so they are absolute."""
        from sae.formats import circuit_tracer
        from sae.formats.common import transcoder_hook

        files = [str((self.out / site.name / f"layer_{site.layer}.safetensors").resolve()) for site in saes]
        hooks = {transcoder_hook(sae, circuit_tracer.NAME).split(".", 2)[2] for sae in saes.values()}
        if len(hooks) > 1:
            raise UserError(f"transcoders of one set read at one place, these at {', '.join(sorted(hooks))}")
        first = next(iter(saes.values()))
        hook = transcoder_hook(first, circuit_tracer.NAME)
        circuit_tracer.write_set(self.out, files, hook, model=first.config.model)

    def _check(self) -> None:
        """Refuse a folder that holds anything but autoencoders that this command wrote."""
        check_run_config(self.out)
        if read_run_config(self.out) and self._before() is None:
            raise UserError(f"{str(self.out)!r} holds a run of another command: give another folder")
        check_contents(self.out, Layout(CONVERTED.files, dict.fromkeys(self._sites(), CONVERTED_SAE)))
        prepare_folder(self.out, overwrite=self.overwrite)

    def _remove_earlier(self) -> None:
        """Take away what an earlier conversion wrote, of whatever format; it is not complete from then on."""
        earlier = self._before()
        if earlier is not None:
            self._note({**earlier, "complete": False})
            for name in self._sites():
                remove(self.out / name, CONVERTED_SAE)
            for path in visible(self.out):
                if path.name != RUN_CONFIG_FILE and CONVERTED.lists(path):
                    path.unlink()

    def _before(self) -> dict[str, Any] | None:
        return read_run_config(self.out).get("convert")

    def _sites(self) -> list[str]:
        """Sites that an earlier conversion wrote."""
        return [str(name) for name in (self._before() or {}).get("sites", [])]

    def _note(self, entry: dict[str, Any]) -> None:
        write_json(self.out / RUN_CONFIG_FILE, {"schema_version": 1, "convert": entry})
