"""The model, SAEs, metric and prompts that a circuit was found with.

A circuit found in this process holds them. One that was read from disk loads each when it is first asked for, from
where the metadata say it is, and compares fingerprints: a circuit never meets another model or other dictionaries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuits.metrics.metrics import Metric, circuit_metric
from circuits.prompts.dataset import PromptSet, make_prompts
from circuits.prompts.formats import read_examples
from sae.autoencoder import WEIGHTS_FILE, SparseAutoencoder
from sae.errors import UserError
from sae.formats.locate import check_source, sae_folders
from sae.model.device_map import DeviceMap
from sae.model.language_model import LanguageModel
from sae.model.load import load_model
from sae.model.sites import Site
from sae.neurons import DICTIONARIES
from sae.saes import GIB, SAEs, as_saes, load_saes, saes_fingerprint
from sae.splice import check_saes


@dataclass
class CircuitSource:
    """Loads the model, SAEs, metric and prompts of a circuit once, where they were not given."""

    model: LanguageModel | str | None = None
    """The model, or its name; None for the one that the metadata name."""
    saes: Mapping[Site, SparseAutoencoder] | str | Path | None = None
    """The SAEs, or where they are; None for those that the metadata name."""
    metric: str | Metric | None = None
    """The metric; needed where it is Python code, which a file cannot hold."""
    prompts: PromptSet | None = None
    """The prompts the circuit was found on; None for those that the metadata name."""
    path: str | Path = ""
    """Where the circuit was read from, for error messages."""
    device: str = "auto"
    """Device for the model and the SAEs."""
    dtype: str | None = None
    """Number type of the model; None for the one the circuit was found in."""
    device_map: DeviceMap | None = None
    """How the model is spread over devices, in place of `device`."""
    quantize: str | None = None
    """How linear layers are held, "8bit" or "4bit"; None for what the circuit was found with."""
    remote: str | None = None
    """Where the model runs, if elsewhere."""
    site_paths: Mapping[str, str] | None = None
    """Where sites are; None for where they were when the circuit was found."""
    sae_memory: float | None = None
    """GiB for the SAEs, which are read site by site where they do not fit; None for half of what is free."""
    stream: bool = True
    """Whether SAEs may be read site by site."""

    def get_model(self, metadata: Mapping[str, Any]) -> LanguageModel:
        """The model, loaded the first time; `UserError` where it is another one than the circuit was found in."""
        if not isinstance(self.model, LanguageModel):
            name = self.model or _named(metadata, "model", self.path)
            if isinstance(saes := self.saes or metadata.get("saes"), str | Path) and str(saes) not in DICTIONARIES:
                check_source(saes)  # a wrong name is told before the model is loaded
            self.model = load_model(
                name,
                device=self.device,
                dtype=self.dtype or metadata.get("dtype") or "float32",
                device_map=self.device_map,
                quantize=self.quantize or metadata.get("quantize"),
                remote=self.remote,
                site_paths=self.site_paths or parse_site_paths(metadata.get("site_paths")),
            )
            noted = metadata.get("model_fingerprint")
            if noted and not self.model.is_model(noted):
                raise UserError(
                    f"the circuit in {str(self.path)!r} was found in another model than {self.model.name!r} "
                    f"(fingerprint {noted}, not {self.model.fingerprint}): give --model"
                )
        return self.model

    def get_saes(self, metadata: Mapping[str, Any]) -> SAEs:
        """The SAEs, loaded the first time; `UserError` where they are others than the circuit was found with."""
        if self.saes is None or isinstance(self.saes, str | Path):
            path = self.saes or _named(metadata, "saes", self.path)
            model = self.get_model(metadata)
            sites = [Site.parse(name) for name in metadata["sites"]]
            saes = load_checked_saes(model, path, sites=sites, sae_memory=self.sae_memory, stream=self.stream)
            noted = metadata.get("saes_fingerprint")
            if noted and noted != saes_fingerprint(saes):
                raise UserError(
                    f"the circuit in {str(self.path)!r} was found with other autoencoders than those that are now in "
                    f"{str(path)!r}: give --saes, or discover it again"
                )
            self.saes = saes
        return as_saes(self.saes)

    def get_metric(self, metadata: Mapping[str, Any]) -> Metric:
        """The metric; `UserError` where it is code that was not given, or another metric than the circuit's."""
        if not callable(self.metric):
            self.metric = circuit_metric(metadata, given=self.metric)
        return self.metric

    def get_prompts(self, metadata: Mapping[str, Any]) -> PromptSet:
        """The prompts that the circuit was found on, read and tokenised the first time."""
        if self.prompts is None:
            self.prompts = self.read_prompts(metadata)
        return self.prompts

    def read_prompts(
        self,
        metadata: Mapping[str, Any],
        path: str | Path | None = None,
        *,
        limit: int | None = None,
        need_spans: bool | None = None,
    ) -> PromptSet:
        """Prompts of a file, or those the circuit was found on, tokenised for its model.

        They have spans where they are needed or the circuit is by span, found by its template if it has one; where
        `need_spans` is False, prompts of which none has them will do as well.
        Raises UserError where the file of the circuit's own prompts has changed.
        """
        source = path or _named(metadata, "prompts", self.path)
        examples, model = read_examples(source), self.get_model(metadata)

        def make(limit: int | None, need_spans: bool) -> PromptSet:
            template = metadata.get("span_template")
            return make_prompts(
                examples, model, limit=limit, need_spans=need_spans, span_template=template, name=str(source)
            )

        by_span = metadata.get("need_spans", False)
        if str(source) == metadata.get("prompts") and "prompts_fingerprint" in metadata:
            found_on = make(metadata["examples"], by_span)
            if found_on.fingerprint != metadata["prompts_fingerprint"]:
                raise UserError(
                    f"the prompts in {str(source)!r} are not those the circuit was found on (fingerprint "
                    f"{found_on.fingerprint}, not {metadata['prompts_fingerprint']}): put them back, or discover again"
                )
        if path is None:
            limit = metadata["examples"] if limit is None else min(limit, metadata["examples"])
        try:
            return make(limit, need_spans or by_span)
        except UserError:
            if path is None or need_spans is not False:
                raise
            return make_prompts(examples, model, limit=limit, name=str(source))


def has_other_saes(metadata: Mapping[str, Any], circuit: Path) -> bool:
    """Whether the SAEs that a circuit names were trained again since, so that its features are others now.

    Only those that are newer than the circuit are read, and only those on this machine.

    Args:
        metadata: of the circuit, with paths as they are now.
        circuit: its circuit.json.
    """
    noted, path = metadata.get("saes_fingerprint"), Path(metadata.get("saes") or "")
    if not noted or not metadata.get("saes") or not path.is_dir():
        return False
    weights = [folder / WEIGHTS_FILE for folder in sae_folders(path)]
    try:
        if all(file.stat().st_mtime <= circuit.stat().st_mtime for file in weights if file.is_file()):
            return False
        sites = [Site.parse(name) for name in metadata.get("sites", ())] or None
        return saes_fingerprint(load_saes(path, device="cpu", sites=sites)) != noted
    except UserError:  # a training that has not ended, or other sites
        return True


def check_widths(n_features: Mapping[Site, int], saes: SAEs, path: str | Path) -> None:
    """`UserError` where a circuit has another number of features at a site than the SAE there."""
    for site, expected in n_features.items():
        if expected != (width := saes.config(site).n_features):
            raise UserError(f"the circuit in {str(path)!r} has {expected} features at {site}, the autoencoder {width}")


def load_checked_saes(
    model: LanguageModel,
    path: str | Path,
    *,
    sites: list[Site] | None = None,
    sae_memory: float | None = None,
    stream: bool = True,
) -> SAEs:
    """The SAEs of a run, checked against the model they are attached to; the model's neurons for `neurons`.

    Args:
        model: the model that they read.
        path: run folder, folder of SAEs, or where they are on the hub.
        sites: those to load; all by default.
        sae_memory: GiB beyond which they are read site by site; half of what is free by default.
        stream: whether they may be read site by site; else all are loaded.
    """
    if str(path) in DICTIONARIES:
        return DICTIONARIES[str(path)](model, sites=sites)
    budget = None if sae_memory is None else sae_memory * GIB
    saes = load_saes(path, device=model.device, sites=sites, budget=budget if stream else float("inf"))
    check_saes(model, saes)
    return saes


def parse_site_paths(text: str | None) -> dict[str, str] | None:
    """`"resid=model.layers.{layer},attn_0=model.first"` -> {"resid": "model.layers.{layer}", "attn_0": ...}."""
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    wrong = next(("".join(pair) for pair in pairs if not (pair[0].strip() and pair[2].strip())), None)
    if wrong is not None:
        raise UserError(f"site-paths has {wrong!r}: write SITE=MODULE pairs, such as resid=model.layers.{{layer}}")
    return {kind.strip(): path.strip() for kind, _, path in pairs}


def _named(metadata: Mapping[str, Any], key: str, path: str | Path) -> str:
    if key not in metadata:
        where = f" in {str(path)!r}" if path else ""
        raise UserError(f"the circuit{where} does not say where its {key} are: give {key}=")
    return metadata[key]
