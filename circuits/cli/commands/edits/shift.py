"""`sfc shift`: take from a probe the features that it should not use. `sfc tpp`: are features of one class alone?"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuits.cli.options import HasModel, HasSaes, Named, Output, Overwrites, UsesSaes, plain
from circuits.cli.results import ResultFiles, different_options, digest_of, made_with, output_file
from circuits.debiasing.options import PerturbationOptions, ShiftOptions
from sae._files import make_folder, write_json, write_text
from sae._run.contents import CIRCUIT, MEASURED, check_contents, check_run_config, remove
from sae._run.locks import lock
from sae._run.outputs import check_no_link, like
from sae.errors import UserError

if TYPE_CHECKING:
    from circuits.circuit import Circuit
    from circuits.debiasing.data import TextSet
    from circuits.debiasing.probing import Study
    from circuits.debiasing.shift import Prepared
    from sae.saes import SAEs

JUDGING = ("features", "tokens", "drop", "keywords", "concept_data", "threshold", "program", "timeout", "operation",
           "random")  # fmt: skip
"""Options that the circuit does not depend on."""
KEYS_OF_TPP = ("schema_version", "kind", "site", "position", "classes", "sizes", "accuracy", "drops", "features", "tpp")
"""What the file of `sfc tpp` is told by."""


@dataclass(frozen=True, kw_only=True)
class _Labelled(UsesSaes, HasSaes, HasModel):
    """Texts with labels."""

    data: str
    """Texts with labels: JSON lines or CSV with text and the labels' keys, FOLDER:split, or a hub data set such as
    LabHC/bias_in_bios:train.
    """
    test: str | None = None
    """Other such texts to test on; a share of --data by default."""

    def load(self) -> tuple[Any, SAEs]:
        """The model and its autoencoders."""
        from circuits.cli.common import load_checked_saes, load_model

        model = load_model(self.model, self, saes=self.saes)
        return model, load_checked_saes(model, self.saes, options=self)


@dataclass(frozen=True, kw_only=True)
class ShiftCommand(Named, _Labelled):
    """Debias a probe (SHIFT): train it where two labels agree, find the circuit of its output, have its features
    judged, ablate those that it should not use, and test it where the labels disagree, beside the usual baselines.
    Without a judge (--drop, --keywords, --concept-data, --program) it lists the features to judge.
    """

    out: Path
    """Run folder that receives circuit/ with the probe, its circuit and shift.json; that circuit is not found again for
    another judge.
    """
    options: ShiftOptions = field(default_factory=ShiftOptions)

    def run(self) -> Output:
        with lock(self.out):
            return self._run(self._folder())

    def _run(self, folder: Path) -> Output:
        from circuits.circuit import circuit_digest
        from circuits.cli.common import record
        from circuits.debiasing.plots import plot_shift
        from circuits.debiasing.shift import measure, prepare
        from circuits.labels import LabelsFile

        model, saes = self.load()
        prepared = prepare(model, saes, self.data, self.test, self.options)
        circuit = self._circuit(prepared, folder)
        files = self._files(folder, circuit=circuit_digest(folder))
        files.check()
        lines = LabelsFile.of(circuit.metadata, self.out).read()
        report = measure(prepared, circuit, labels={name: line["label"] for name, line in lines.items()})
        data = files.write(report.to_dict())
        plot_shift(report, files.path(".svg"))
        record(self.out, "shift", self)
        written = f"wrote {files.path('.json')} and {files.path('.svg')}"
        return Output(f"{report.text()}\n{written}", data)

    def _files(self, folder: Path, **more: Any) -> ResultFiles:
        files = {"drop": self.options.drop, "concept_data": self.options.concept_data}  # told by their contents
        others = replace(self.options, drop=None, concept_data=None)
        return ResultFiles(folder, "shift", self, made_with(self, options=plain(others), **files, **more))

    def _folder(self) -> Path:
        """The circuit folder, which may hold what this command wrote."""
        from circuits.circuit import GRAPH_FILE
        from sae._files import read_json

        folder = self.out / "circuit"
        check_run_config(self.out)
        check_no_link(folder)
        check_contents(folder, CIRCUIT)
        self._files(folder).check_foreign()
        path = folder / GRAPH_FILE
        if path.is_file() and not self.overwrite and "shift" not in read_json(path).get("metadata", {}):
            raise UserError(
                f"{str(folder)!r} holds another circuit, not of sfc shift: give another --out, or --overwrite"
            )
        return make_folder(folder)

    def _circuit(self, prepared: Prepared, folder: Path) -> Circuit:
        """The circuit of the probe's output: that in the folder where it is the same, else found now."""
        from circuits.circuit import GRAPH_FILE, Circuit

        study = prepared.study
        found_with = self._found_with(prepared)
        if (folder / GRAPH_FILE).is_file():
            circuit = Circuit.load(folder, model=study.model, saes=study.saes)
            before = circuit.metadata.get("shift")
            if isinstance(before, dict) and "label_digest" not in before:  # of an earlier version
                before = {**before, "label_digest": found_with["label_digest"]}
            differing = different_options({"made_with": before}, found_with)
            if not differing:
                return circuit
            if not self.overwrite:
                raise UserError(
                    f"{str(folder)!r} holds the circuit of another probe ({differing}): give another --out, or "
                    "--overwrite"
                )
        return self._found(prepared, folder, found_with)

    def _found(self, prepared: Prepared, folder: Path, found_with: dict[str, Any]) -> Circuit:
        from circuits.circuit import EFFECTS_FILE, FEATURES_FILE, GRAPH_FILE
        from circuits.cli.commands.circuits.discover import set_edits_aside
        from circuits.cli.common import absolute_path
        from circuits.discovery.description import describe_features
        from circuits.metrics.probe import save_probe

        study = prepared.study
        for outdated in (GRAPH_FILE, EFFECTS_FILE):  # there is no circuit until all of the new one is there
            (folder / outdated).unlink(missing_ok=True)
        remove(folder, MEASURED, with_folder=False)
        set_edits_aside(self.out)
        probe, file = study.probe(), folder / "probe.safetensors"
        save_probe(
            file, probe.weight, probe.bias, site=probe.site, position=probe.position, classes=study.original.classes,
            model=study.model, overwrite=True,
        )  # fmt: skip
        texts = study.ambiguous.first(self.options.circuit_texts)
        as_prompts = _as_prompts(texts, study, folder / "probe_texts.jsonl")  # texts that no file can hold are told now
        circuit = study.circuit(f"probe-margin:{file.resolve()}", progress=not self.quiet, warn=True)
        circuit.metadata.update(
            model=absolute_path(self.model), saes=absolute_path(self.saes), site_paths=self.site_paths,
            shift=found_with, title=f"probe of {self.options.intended} in {Path(self.model).name}", **as_prompts,
        )  # fmt: skip
        features = describe_features(circuit, prompts=texts.prompts)
        write_json(folder / FEATURES_FILE, {"schema_version": 1, "features": features})
        circuit.save(folder)
        return circuit

    def _found_with(self, prepared: Prepared) -> dict[str, Any]:
        """All that decides the circuit."""
        from sae.saes import saes_fingerprint

        study = prepared.study
        options = {one.name: getattr(self.options, one.name) for one in fields(self.options) if one.name not in JUDGING}
        return {
            **{name: str(value) if isinstance(value, Path) else value for name, value in options.items()},
            "texts": study.ambiguous.prompts.fingerprint, "labels": len(set(study.ambiguous.intended)),
            "label_digest": digest_of({"intended": study.ambiguous.intended}),
            "model_fingerprint": study.model.fingerprint, "saes_fingerprint": saes_fingerprint(study.saes),
        }  # fmt: skip


def _as_prompts(texts: TextSet, study: Study, file: Path) -> dict[str, Any]:
    """Write the texts that a circuit was found on as a prompt file; returns what a circuit says of it, so that other
    commands read them.
    """
    from circuits.debiasing.data import prompt_rows
    from circuits.prompts.dataset import load_prompts

    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in prompt_rows(texts)]
    write_text(file, "".join(lines))
    prompts = load_prompts(file, study.model, need_spans=True)
    return {
        "prompts": str(file.resolve()), "prompts_fingerprint": prompts.fingerprint, "examples": len(prompts),
        "span_template": None, "need_spans": True,
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TppCommand(Overwrites, _Labelled):
    """Test whether the features that tell one class from the others are of that class alone: zero them, and see which
    classes' probes fail (targeted probe perturbation).
    """

    out: Path | None = None
    """File to write, .json; none by default."""
    options: PerturbationOptions = field(default_factory=PerturbationOptions)

    def run(self) -> Output:
        if self.out is None:
            return self._run()
        with output_file(self.out, like(KEYS_OF_TPP), overwrite=self.overwrite):
            return self._run()

    def _run(self) -> Output:
        from circuits.debiasing.targeted import targeted_perturbation

        model, saes = self.load()
        report = targeted_perturbation(model, saes, self.data, self.test, self.options)
        if self.out is not None:
            write_json(self.out, report.to_dict())
        return Output(report.text() + (f"\nwrote {self.out}" if self.out else ""), report.to_dict())
