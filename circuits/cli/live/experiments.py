"""Experiments of a page on a run: read a prompt, try an edit, find the circuit of a pair.

Each is a job in steps (`circuits.cli.live.jobs`). An edit is a `sfc ablate` or `sfc steer` command as on the command
line, run on the model that is loaded already: it writes the same file, and its words repeat it. All that is written are
`edits/NAME.jsonl`, the prompt, and `edits/NAME.json`, what was measured.

Shapes: S tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from circuits.attribution.activations import Setting, capture_activations
from circuits.attribution.node_effects import attribute
from circuits.cli.commands.circuits.discover import DiscoverCommand
from circuits.cli.commands.edits.edit import AblateCommand, SteerCommand
from circuits.cli.live.jobs import Job
from circuits.cli.live.open_run import OpenRun
from circuits.cli.live.requests import FindCircuit, LookAt, TryEdit
from circuits.cli.options import RunsCircuit, UsesSaes
from circuits.cli.results import MADE_WITH, digest_of, made_with
from circuits.discovery.description import describe_features
from circuits.discovery.discover import discover
from circuits.editing.applied import frozen
from circuits.editing.edit import Trial
from circuits.editing.measures import continued
from circuits.editing.results import Continuation
from circuits.editing.targets import parse_features
from circuits.metrics.metrics import last_logits, logit_difference
from circuits.options import DiscoverOptions
from circuits.prompts.dataset import PromptSet, load_prompts, make_prompts
from circuits.prompts.formats import Example
from graphs.explorer import explorer_html
from sae._files import write_json, write_text
from sae._run.contents import check_no_link
from sae._run.locks import lock
from sae.data.text import TextSource
from sae.errors import UserError
from sae.model.language_model import LanguageModel

MOST_FEATURES = 20_000
"""Features of a prompt that are sent at most, over all of its tokens."""
FEATURES_A_TOKEN = 60
TOP_TOKENS = 10
"""Most probable next tokens that are shown."""
CIRCUITS_KEPT = 10
"""Circuits of pairs that stay open."""


@dataclass
class Experiments(OpenRun):
    """A run with its model loaded, and what a page can do with it."""

    # ------------------------------------------------------------------------------------------ a prompt

    def look_at(self, job: Job, request: LookAt) -> Iterator[None]:
        """Tokens, next tokens, and the features that are active on each token, with their share in the answer."""
        ids = self._prompt_ids(request.prompt)
        logits = last_logits(self.model, self._prompts(request.prompt, 0, None))[0]  # [V]
        top = logits.topk(min(TOP_TOKENS, len(logits))).indices.tolist()
        answer = top[0] if request.answer is None else self._token(request.prompt, request.answer)
        against = answer if request.against is None else self._token(request.prompt, request.against)
        if against == answer:
            against = next(id for id in top if id != answer)
        job.say(
            "prompt",
            tokens=self.model.token_strings(ids),
            special=[position for position, id in enumerate(ids) if id in self.model.special_ids],
            next=self._probabilities({"before": logits}, [*top, answer, against]),
            answer=answer,
            against=against,
        )
        job.say("features", tokens=self._features(self._prompts(request.prompt, answer, against), len(ids)))
        yield

    def _prompt_ids(self, prompt: str) -> list[int]:
        if not prompt.strip():
            raise UserError("the prompt is empty: type some words")
        ids = self.model.text_coder.prompt_ids([prompt])[0]
        if len(ids) > self.longest:
            raise UserError(f"the prompt has {len(ids)} tokens: at most {self.longest} are read here, shorten it")
        return ids

    def _token(self, prompt: str, given: int | str) -> int:
        """The id of a next token. Raises UserError for what is not one token there."""
        if isinstance(given, int):
            if not 0 <= given < self.model.vocab_size:
                raise UserError(f"there is no token {given}: the model has tokens 0 to {self.model.vocab_size - 1}")
            return given
        ids = self.model.text_coder.continuations([prompt], [given])[0]
        if ids is None or len(ids) != 1:
            raise UserError(
                f"{given!r} is not one token after this prompt: new words begin with a space, as in ' have'"
            )
        return ids[0]

    def _prompts(self, prompt: str, answer: int, against: int | None) -> PromptSet:
        """The prompt alone, with token ids for its answers."""
        example = Example(prompt, (answer,), patch_answers=() if against is None else (against,))
        return make_prompts([example], self.model, name="the prompt")

    def _probabilities(self, logits: dict[str, Tensor], ids: Sequence[int]) -> list[dict[str, Any]]:
        """Next tokens with their probability in each run, [V] logits each."""
        chosen = list(dict.fromkeys(ids))
        shares = {name: of_run.float().softmax(-1)[chosen].tolist() for name, of_run in logits.items()}
        texts = self.model.token_strings(chosen)
        return [
            {"id": id, "token": text, **{name: of_run[row] for name, of_run in shares.items()}}
            for row, (id, text) in enumerate(zip(chosen, texts, strict=True))
        ]

    def _features(self, prompts: PromptSet, n_tokens: int) -> list[list[tuple[str, float, float]]]:
        """For each token (name, activation, effect) of its features, the strongest by either."""
        model, saes = self.model, self.circuit.saes
        states = capture_activations(Setting(model, saes, logit_difference), prompts, gradient=True)
        result = attribute(states, method="attrib", totals=False)
        of_token: list[list[tuple[str, float, float]]] = [[] for _ in range(n_tokens)]
        for site, sae in saes.items():
            effects = result.effects[site]
            entries = zip(effects.position.tolist(), effects.feature.tolist(), effects.value.tolist(), strict=True)
            effect_of = {(position, feature): value for position, feature, value in entries}
            active = sae.encode_sparse(states.of_site(site).read_clean[0])
            columns = (active.token.tolist(), active.feature.tolist(), active.value.tolist())
            for token, feature, value in zip(*columns, strict=True):
                of_token[token].append((f"{site}/{feature}", value, effect_of.get((token, feature), 0.0)))
        most = max(5, min(FEATURES_A_TOKEN, MOST_FEATURES // max(1, n_tokens)))
        return [_strongest(features, most) for features in of_token]

    # ------------------------------------------------------------------------------------------ an edit

    def try_edit(self, job: Job, request: TryEdit) -> Iterator[None]:
        """Next tokens and continuation, edited and not, beside random features; then what the edit costs elsewhere."""
        n_tokens = len(self._prompt_ids(request.prompt))
        if isinstance(request.where, int) and request.where >= n_tokens:
            raise UserError(f"there is no token {request.where}: the prompt has tokens 0 to {n_tokens - 1}")
        for answer in (request.answer, request.against):
            self._token(request.prompt, answer)
        parse_features(request.features, self.circuit.saes)  # a name that is none is told before a file is written
        new_tokens = max(0, min(request.new_tokens, (self.model.max_positions or 10**9) - n_tokens))
        command = self._command(request, new_tokens)
        with lock(self.run, shared=True):
            self._write_prompt(Path(command.prompts or ""), self._row(request))
            path, made_with = command.file(command.operation, command.value)
        job.say("command", line=command_line(command), name=path.stem)
        trial = command.trial(self.circuit, command.operation, command.value)
        job.expected = (3 + len(trial.texts)) * (2 + command.random) + 3 * new_tokens
        with frozen(self.model, trial.listed):
            self._say_probabilities(job, trial, [request.answer, request.against])
            continuation = self._continue(job, trial, new_tokens)
        yield
        report = trial.report(continuation)
        job.check()
        with lock(self.run, shared=True):
            write_json(path, {**report.to_dict(), MADE_WITH: made_with})
        job.say("report", report=report.to_dict())

    def _command(self, request: TryEdit, new_tokens: int) -> AblateCommand | SteerCommand:
        """The command, under a name of its own for everything that decides what it measures."""
        where = "" if request.where == "everywhere" else f"@{request.where}"
        text = self.text if request.operation == "mean" or not where else None
        given: dict[str, Any] = {
            **{option.name: getattr(self.options, option.name) for option in fields(UsesSaes) + fields(RunsCircuit)},
            "json": False,
            "features": ",".join(f"{feature}{where}" for feature in request.features),
            "operation": request.operation,
            "value": request.value,
            "freeze": request.freeze,
            "text": text,
            "texts": self.texts,
            "generate": int(new_tokens > 0),
            "new_tokens": max(1, new_tokens),
        }
        if request.operation == "mean" and text is None:
            raise UserError("the mean is taken over held-out text: start sfc serve with --text FILE")
        if request.operation in ("steer", "scale") and request.value is None:
            raise UserError(f"the operation {request.operation!r} needs a value")
        kind = SteerCommand if request.operation in ("steer", "scale") else AblateCommand
        command: AblateCommand | SteerCommand = kind(**given)
        decides = made_with(command, prompt=self._row(request), circuit=self.circuit.metadata.get("digest"))
        name = f"live_{request.operation}_{digest_of(decides)}"
        return replace(command, name=name, prompts=str(self.run / "edits" / f"{name}.jsonl"))

    def _row(self, request: TryEdit) -> dict[str, Any]:
        """The prompt as a line of a prompt file, answers as text where the text says which token is meant."""
        texts = self.model.token_strings([request.answer, request.against])
        meant = self.model.text_coder.continuations([request.prompt] * 2, texts)
        answer, against = (
            text if ids == [id] else id
            for text, ids, id in zip(texts, meant, (request.answer, request.against), strict=True)
        )
        return {"clean_prefix": request.prompt, "clean_answer": answer, "patch_answer": against}

    def _write_prompt(self, file: Path, row: dict[str, Any]) -> None:
        check_no_link(file.parent)
        check_no_link(file)
        write_text(file, json.dumps(row, ensure_ascii=False) + "\n")

    def _say_probabilities(self, job: Job, trial: Trial, answers: list[int]) -> None:
        """Next tokens before and after, and with random features edited instead."""
        runs = {"before": last_logits(self.model, trial.prompts)[0]}
        runs["after"] = last_logits(self.model, trial.prompts, edits=trial.edits)[0]
        top = [id for logits in runs.values() for id in logits.topk(min(6, len(logits))).indices.tolist()]
        rows = self._probabilities(runs, [*answers, *top])
        job.say("next", rows=rows)
        draws = [last_logits(self.model, trial.prompts, edits=trial.edits_of(draw))[0] for draw in trial.draws]
        shares = [logits.float().softmax(-1) for logits in draws]
        job.say("next", rows=[{**row, "random": [share[row["id"]].item() for share in shares]} for row in rows])

    def _continue(self, job: Job, trial: Trial, new_tokens: int) -> list[Continuation]:
        """Continue the prompt as it is, edited, and with random features edited, word by word."""
        if not new_tokens:
            return []
        runs = {"before": None, "after": trial.edits}
        if trial.draws:
            runs["random"] = trial.edits_of(trial.draws[0])
        said = {
            name: continued(
                self.model, trial.prompts, edits, new_tokens=new_tokens, streamer=_Streamer(job, self.model, name)
            )[0]
            for name, edits in runs.items()
        }
        job.say("continuations", **said)
        return [Continuation(trial.prompts.texts[0], said["before"], said["after"])]

    # ------------------------------------------------------------------------------------------ the circuit of a pair

    def find_circuit(self, job: Job, request: FindCircuit) -> Iterator[None]:
        """Attribution patching of one pair with the run's autoencoders, as a page of the explorer."""
        for prompt in (request.clean, request.patch):
            self._prompt_ids(prompt)
        row = {
            "clean_prefix": request.clean, "patch_prefix": request.patch, "clean_answer": request.clean_answer,
            "patch_answer": request.patch_answer,
        }  # fmt: skip
        name = f"pair_{digest_of(row)}"
        file = self.run / "edits" / f"{name}.jsonl"
        with lock(self.run, shared=True):
            self._write_prompt(file, row)
        command = self._discovery(file, name)
        job.say("command", line=command_line(command), name=name)
        prompts = load_prompts(file, self.model)
        job.say("progress", share=0.1)
        yield
        circuit = discover(self.model, self.circuit.saes, prompts, command.options, progress=False)
        job.say("progress", share=0.6)
        yield
        features = describe_features(circuit, self._read_texts())
        graph = circuit.graph(nodes=command.most_nodes, edges=command.edges, attributes=features)
        graph.metadata["title"] = f"{request.clean}{request.clean_answer} / {request.patch}{request.patch_answer}"
        while len(self.pages) >= CIRCUITS_KEPT:
            del self.pages[next(iter(self.pages))]
        self.pages[name] = explorer_html(graph)
        strongest = circuit.strongest_features(10)
        job.say("circuit", id=name, total_effect=circuit.metadata["total_effect"], strongest=list(strongest))

    def _read_texts(self) -> Iterator[str] | None:
        return TextSource.of(self.text).read() if self.text else None

    def _discovery(self, file: Path, name: str) -> DiscoverCommand:
        metadata, options = self.circuit.metadata, self.options
        sites = metadata["options"]["sites"]
        return DiscoverCommand(
            model=options.model or metadata["model"], saes=options.saes or metadata["saes"], prompts=str(file),
            out=self.run.with_name(f"{self.run.name}_{name}"), device=options.device, dtype=options.dtype,
            device_map=options.device_map, quantize=options.quantize, remote=options.remote,
            site_paths=options.site_paths or metadata.get("site_paths"),
            sae_memory=getattr(options, "sae_memory", None), text=self.text,
            options=DiscoverOptions(method="attrib", sites=sites, edge_nodes=100),
        )  # fmt: skip


class _Streamer:
    """Takes new tokens from Hugging Face's `generate`, and lets a job say the text so far."""

    def __init__(self, job: Job, model: LanguageModel, run: str) -> None:
        self.job, self.model, self.run = job, model, run
        self.ids: list[int] | None = None

    def put(self, value: Tensor) -> None:
        """The prompt's tokens, then one new token at a time."""
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        self.job.say("text", run=self.run, text=self.model.tokenizer.decode(self.ids, skip_special_tokens=True))

    def end(self) -> None:
        """There are no more tokens."""


def _strongest(features: list[tuple[str, float, float]], most: int) -> list[tuple[str, float, float]]:
    """The strongest by activation or by |effect|, in the order of activation."""
    if len(features) > most:
        by_activation = sorted(features, key=lambda feature: -feature[1])[: most // 2]
        by_effect = sorted(features, key=lambda feature: -abs(feature[2]))[: most // 2]
        features = list({feature[0]: feature for feature in (*by_activation, *by_effect)}.values())
    return sorted(features, key=lambda feature: -feature[1])


def command_line(command: Any) -> str:
    """The words with which `sfc` runs a command, options at their default left out."""
    names = {AblateCommand: "ablate", SteerCommand: "steer", DiscoverCommand: "discover"}
    return shlex.join(["sfc", names[type(command)], *_words(command)])


def _words(options: Any) -> Iterator[str]:
    for option in fields(options):
        value = getattr(options, option.name)
        if is_dataclass(value):
            yield from _words(value)
        elif value != (option.default if option.default is not MISSING else MISSING):
            yield f"--{option.name.replace('_', '-')}"
            if value is not True:
                yield str(value)
