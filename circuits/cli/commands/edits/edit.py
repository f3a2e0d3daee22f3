"""`sfc ablate` and `sfc steer`: edit the model through features and see what becomes of the behaviour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from circuits.cli.options import HasTestPrompts, Named, Output, RunsCircuit, UsesSaes
from circuits.cli.results import MADE_WITH, different_options, digest_of, made_with, read_result
from circuits.options import EditedTokens, Freeze, Operation
from sae._files import write_json
from sae._options import Activation, Count, Positive, Range, Repeats, Seed, Weight
from sae._run.locks import lock
from sae._run.outputs import check_no_link
from sae.data.text import TextSource
from sae.errors import UserError

if TYPE_CHECKING:
    from circuits.circuit import Circuit
    from circuits.editing.declaration import Edit
    from circuits.editing.edit import Trial
    from circuits.editing.random_features import EffectDraw
    from circuits.editing.results import EditReport


CHOSEN_ON = 100
"""Texts that features are chosen on."""


@dataclass(frozen=True, kw_only=True)
class _Edit(UsesSaes, Named, HasTestPrompts, RunsCircuit):
    """Which features are edited, and what is measured."""

    top: Positive | None = None
    """Edit the n strongest features of the circuit."""
    features: str | None = None
    """Edit these features, such as resid_3/120,mlp_2/7; at a span of the prompts alone, such as resid_3/120@subject, or
    at generated tokens alone, resid_3/120@generated; or those of a supernode, supernode:plural-subject.
    """
    groups: Path | None = None
    """Supernodes that the explorer saved, beside those of the circuit; --features may name them."""
    choose: Literal["surgical", "flip"] | None = None
    """surgical, of ablate: choose features that remove the behaviour in every case and cost little elsewhere; flip, of
    steer: features of one site and the strength at which, mirrored about their mean, they turn the answers round. On
    the prompts the circuit was found on and the texts of --text behind those that are measured (of half of them where
    there are few).
    """
    penalty: Weight = 3.0
    """With --choose surgical, what a nat of cross-entropy elsewhere weighs against all of the behaviour."""
    edit: Path | None = None
    """Make the edits of this file: a file of edits, or edits/NAME.json of an earlier ablate or steer."""
    everywhere: bool = False
    """Edit the features of a circuit by span or position at all tokens, or at those of --where."""
    where: EditedTokens = "all"
    """At which tokens: all, those where the feature is active, the prompt's alone, or generated ones alone."""
    freeze: Freeze | None = None
    """attention: every head looks where it looks in the unedited model, at all tokens but generated ones."""
    relative: bool = False
    """--value is in units of each feature's largest activation, on --text, else on the prompts."""
    text: str | None = None
    """Other text on which the cross-entropy is measured, .txt or .jsonl; edits of spans are at all of its tokens."""
    texts: Positive = 200
    """Texts read of --text."""
    generate: Count = 0
    """Prompts that are continued before and after."""
    new_tokens: Annotated[int, Range(1, 10**6)] = 30
    """Length of a continuation."""
    scales: str | None = None
    """Strengths at which the edit is measured as well, such as 0,0.5,1,2,4: its changes times these."""
    random: Repeats = 5
    """Draws of equally many random active features, edited likewise, also at equal norm, and of random directions."""
    random_anywhere: bool = False
    """Draw random features from all sites together instead of as many per site as are edited."""
    seed: Seed = 0
    """Seed of the random draws."""
    choices: ClassVar[str] = "surgical"
    """What --choose can be."""

    def measured(self, operation: Operation, value: float | None) -> Output:
        """Edit the model, measure what became of it, and write edits/NAME.json."""
        from circuits.circuit import circuit_folder

        if sum(given is not None for given in (self.top, self.features, self.edit, self.choose)) != 1:
            raise UserError(
                "say which features to edit: either --top N, --features resid_3/120,mlp_2/7, --edit FILE.json, or "
                f"--choose {self.choices}"
            )
        if self.choose not in (None, self.choices):
            raise UserError(f"--choose {self.choose} is of another command: here it can be {self.choices}")
        if self.choose is not None and self.text is None:
            raise UserError("--choose needs --text: what the edit costs elsewhere is measured on it")
        if self.choose is not None and self.freeze is not None:
            raise UserError("--choose chooses on the model as it is: leave out --freeze, or edit again with --edit")
        self._check_used(operation, value)
        parse_scales(self.scales)
        with lock(circuit_folder(self.circuit).parent, shared=True):
            return self._measured(operation, value)

    def _check_used(self, operation: Operation, value: float | None) -> None:
        """`UserError` for an option that would change nothing beside --edit or --choose."""
        usual = {option.name: option.default for option in fields(self)}
        given = {"operation": operation, "value": value, "where": self.where, "relative": self.relative,
                 "groups": self.groups}  # fmt: skip
        if self.choose == "surgical":
            del given["operation"]  # of what is chosen
        source = "--edit" if self.edit is not None else "--choose" if self.choose is not None else None
        unused = [name for name, option in given.items() if option != usual[name]] if source else []
        if unused:
            raise UserError(f"{source} says what becomes of which features, and where: leave out --{unused[0]}")
        if self.penalty != usual["penalty"] and self.choose != "surgical":
            raise UserError("--penalty is of --choose surgical alone: leave it out")

    def _measured(self, operation: Operation, value: float | None) -> Output:
        from circuits.circuit import circuit_folder
        from circuits.cli.common import load_circuit, record

        path, made_with_these = self.file(operation, value)
        circuit = load_circuit(self)
        self.before_measuring(circuit, operation, value)
        report = self._chosen(circuit, operation) if self.choose else self.trial(circuit, operation, value).report()
        data = {**report.to_dict(), MADE_WITH: made_with_these}
        write_json(path, data)
        record(circuit_folder(self.circuit).parent, "edit", self, name=path.stem)
        return Output(f"{report.text()}\nwrote {path}", data)

    def before_measuring(self, circuit: Circuit, operation: Operation, value: float | None) -> None:
        """A hook for commands that do more with the edit."""

    def trial(
        self, circuit: Circuit, operation: Operation, value: float | None, chosen: Sequence[Edit] | None = None
    ) -> Trial:
        """The edits of a circuit that is loaded, ready to be measured."""
        from circuits.editing.edit import EditOptions, prepare_trial
        from circuits.editing.targets import needs_spans
        from circuits.prompts.spans import LAST

        edits = chosen or self._edits(circuit, operation, value)
        at_span = any(needs_spans(edit.features) for edit in edits)
        at_span = at_span or getattr(circuit.metric, "position", LAST) != LAST
        prompts = circuit.read_prompts(self.prompts, limit=self.examples, need_spans=at_span)
        options = EditOptions(
            texts=self._texts()[0],
            generate=self.generate,
            new_tokens=self.new_tokens,
            n_random=self.random,
            same_sites=not self.random_anywhere,
            seed=self.seed,
            scales=parse_scales(self.scales),
            answers=self._answers(circuit) if self.text else (),
            equal_effect=self._of_equal_effect(circuit, edits),
        )
        return prepare_trial(circuit.model, circuit.saes, edits, prompts, options, metric=circuit.metric)

    def _of_equal_effect(self, circuit: Circuit, edits: Sequence[Edit]) -> list[EffectDraw]:
        """Groups to compare an edited supernode with; none for other edits."""
        from circuits.editing.random_features import draws_of_equal_effect

        names = [name.strip() for name in (self.features or "").split(",")]
        is_group = len(edits) == 1 and any(name and "/" not in name for name in names)
        if not is_group:
            return []
        return draws_of_equal_effect(circuit.feature_effects, edits[0].names, n_draws=self.random, seed=self.seed)

    def _texts(self) -> tuple[list[str], list[str]]:
        """Texts to measure on, and with --choose others to choose on."""
        if self.text is None:
            return [], []
        n = self.texts + (CHOSEN_ON if self.choose else 0)
        texts = [text for text in islice(TextSource.of(self.text).read(), n) if text.strip()]
        n_measured = min(self.texts, len(texts) - len(texts) // 2) if self.choose else self.texts
        return texts[:n_measured], texts[n_measured:]

    def _answers(self, circuit: Circuit) -> list[int]:
        """The answers of all prompts in the file of the circuit, or in `--prompts` where that file is gone."""
        from circuits.editing.measures import answers_of

        for path in (circuit.metadata.get("prompts"), self.prompts):
            with suppress(UserError):  # what cannot be measured is told where it is
                return answers_of(circuit.read_prompts(path))
        return []

    def _chosen(self, circuit: Circuit, operation: Operation) -> EditReport:
        """Features chosen on training prompts and text, and what their edit does on others."""
        from circuits.editing.declaration import Edit
        from circuits.editing.flipping import choose_flipping
        from circuits.editing.surgical import choose_surgical

        if self.choose == "flip":
            flipping = choose_flipping(circuit, texts=self._texts()[1], answers=self._answers(circuit))
            return self.trial(circuit, "mean", None, [flipping]).report()
        edit, choice = choose_surgical(
            circuit,
            texts=self._texts()[1],
            operation=operation,
            penalty=self.penalty,
            answers=self._answers(circuit),
            progress=not self.quiet,
        )
        strongest = Edit(list(circuit.strongest_features(10)), "zero").everywhere()
        return self.trial(circuit, operation, None, [edit]).report(choice=choice, strongest=[strongest])

    def _edits(self, circuit: Circuit, operation: Operation, value: float | None) -> list[Edit]:
        """The edits of the file, or the one that the options describe."""
        from circuits.editing.declaration import Edit, expanded, load_edits, load_groups
        from circuits.labels import groups_by_name

        if self.edit is not None:
            edits = load_edits(self.edit)
            edits = [edit.everywhere() for edit in edits] if self.everywhere else edits
        else:
            chosen = self.features or circuit.strongest_features(self.top or 0)
            groups = groups_by_name(circuit.supernodes) | (load_groups(self.groups) if self.groups else {})
            names = expanded(chosen, groups)
            if self.everywhere:
                names = list(dict.fromkeys(name.partition("@")[0] for name in names))
            by_template = operation == "mean" and self.text is None
            edits = [Edit(names, operation, value, self.relative, self.where, by_template=by_template)]
        if self.freeze is not None:
            edits = [replace(edit, freeze=self.freeze) for edit in edits]
        return edits

    def file(self, operation: Operation, value: float | None) -> tuple[Path, dict[str, Any]]:
        """edits/NAME.json and what it is made with; without a name, one made from the edit, with a digest where there
        is another edit of that name.
        """
        from circuits.circuit import circuit_digest, circuit_folder

        self.check_name()
        circuit = circuit_folder(self.circuit)
        folder = circuit.parent / "edits"
        options = made_with(self, circuit=circuit_digest(circuit), operation=operation, value=value)
        what = f"top{self.top}" if self.top is not None else f"{self._n_features()}features"
        usual = f"{operation}{'' if value is None else f'_{value:g}'}_{what}" if self.edit is None else self.edit.stem
        usual = self.choose or usual
        name = self.name or usual
        path = folder / f"{name}.json"
        check_no_link(folder)
        if path.is_file() and (differing := different_options(read_result(path), options)) and not self.overwrite:
            if self.name is not None:
                raise UserError(
                    f"{str(path)!r} holds another edit ({differing}): --overwrite replaces it, or give another --name"
                )
            path = folder / f"{name}_{digest_of(options)}.json"
        return path, options

    def _n_features(self) -> int:
        return len({name.strip() for name in (self.features or "").split(",")})


def parse_scales(text: str | None) -> list[float]:
    """`"0,0.5,1"` -> [0.0, 0.5, 1.0]; `UserError` for anything that is no finite number."""
    scales = [scale.strip() for scale in (text or "").split(",") if scale.strip()]
    try:
        values = [float(scale) for scale in scales]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise UserError(f"scales {text!r}: expected numbers separated by commas, such as 0,0.5,1,2,4")
    return values


@dataclass(frozen=True, kw_only=True)
class AblateCommand(_Edit):
    """Take features out of the model (or fix their value) and measure the behaviour, other text and generation
    before and after.
    """

    operation: Literal["mean", "zero", "resample", "set", "clamp"] = "mean"
    """What the features become: their mean (over --text, else over the prompts at the same place of the same template,
    or at the span), zero, their activation at random tokens, --value, or at most --value.
    """
    value: Activation | None = None
    """Activation for the operations set and clamp."""

    def run(self) -> Output:
        return self.measured(self.operation, self.value)


@dataclass(frozen=True, kw_only=True)
class SteerCommand(_Edit):
    """Push the model along features: add --value times the decoder row everywhere, or scale the activation; or with
    --choose flip turn its answers round.
    """

    value: Activation | None = None
    """Strength: what is added, in units of activation, or the factor of --operation scale."""
    save_model: Path | None = None
    """Write the edited model as a folder that transformers loads: exact, or refused, for steering attention or MLP
    outputs at every token, which is another bias.
    """
    choices: ClassVar[str] = "flip"
    operation: Literal["steer", "scale"] = "steer"
    """steer adds the feature's direction at every token; scale multiplies its activation where it is active."""

    def run(self) -> Output:
        return self.measured(self.operation, self.value)

    def before_measuring(self, circuit: Circuit, operation: Operation, value: float | None) -> None:
        """Save the edited model where that is asked for."""
        from circuits.editing.saved_model import save_model

        if self.save_model is not None and self.choose:
            raise UserError("--save-model saves what is added everywhere alone: --choose flip depends on the features")
        if self.save_model is not None:
            save_model(circuit.model, circuit.saes, self._edits(circuit, operation, value), self.save_model)
