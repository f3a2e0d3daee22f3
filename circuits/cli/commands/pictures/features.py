"""`sfc features`: a page for every feature."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuits.cli.options import Common, Output, Overwrites, UsesSaes
from circuits.cli.results import MADE_WITH, different_options, made_with
from sae._files import read_json, write_json
from sae._options import ContextLength, Positive
from sae._run.contents import FEATURES, PARTIAL_PAGES, check_contents, read_run_config, remove
from sae._run.locks import lock
from sae._run.outputs import check_no_link
from sae.data.text import TextSource
from sae.errors import UserError
from sae.features.options import FeaturePageOptions

if TYPE_CHECKING:
    from circuits.circuit import Circuit
    from circuits.prompts.dataset import PromptSet
    from sae.model.language_model import LanguageModel
    from sae.model.sites import Site
    from sae.saes import SAEs

STATE_FILE = "state.json"


@dataclass(frozen=True, kw_only=True)
class FeaturesCommand(UsesSaes, Overwrites, Common):
    """Show every feature on a page of its own: when it is on, in which contexts, and what becomes of each token when it
    is taken out; for the features of a circuit, or of autoencoders without one.
    """

    circuit: Path | None = None
    """Run folder with a circuit (`sfc discover`), whose features are shown."""
    saes: str | None = None
    """Autoencoders whose features are shown where there is no circuit; or another place of a circuit's."""
    model: str | None = None
    """Their model; by default the one that the circuit or the run names."""
    text: str | None = None
    """Text that is read; by default the one the circuit's features were described on, else the autoencoders' own."""
    prompts: str | None = None
    """Prompts on which a circuit's features are measured by case and span; by default those it was found on."""
    top: Positive | None = None
    """Show the n strongest features of the circuit; all that have edges by default."""
    features: str | None = None
    """Features to show, such as resid_3/120,mlp_2/7."""
    sites: str | None = None
    """Show all features of these sites, such as all, resid or resid_3,mlp_2."""
    groups: bool = False
    """Find groups of features, of all at the sites shown, that form a plane together, such as a circle: groups.json and
    .svg beside the pages.
    """
    automata: bool = False
    """Find features that make one another come next, as the states of an automaton do, at each of the sites shown:
    automata.json and .svg beside the pages.
    """
    context_length: ContextLength = 128
    """Longest context, in tokens, or less if the model takes less; what comes after it in a text is not read."""
    out: Path | None = None
    """Run folder that receives features/; that of the circuit or of the autoencoders by default."""
    resume: bool = False
    """Go on with an interrupted reading of the same text, model, autoencoders and options."""
    options: FeaturePageOptions = field(default_factory=FeaturePageOptions)

    def run(self) -> Output:
        run = self._run_folder()
        folder = run / "features"
        check_no_link(folder)
        with lock(run, shared=True), lock(folder):
            check_contents(folder, FEATURES)
            return self._run(run, folder)

    def _run(self, run: Path, folder: Path) -> Output:
        from circuits.cli.common import record
        from circuits.feature_pages import CIRCUIT_FILE, INDEX_FILE, write_circuit_part, write_page
        from sae.saes import saes_fingerprint

        text = self._text(run)
        circuit, model, saes = self._load(run)
        prompts = self._prompts(circuit)
        asked = self._asked(circuit, saes)
        names = [f"{site}/{index}" for site, indices in asked.items() for index in indices]
        of_saes = {"model_fingerprint": model.fingerprint, "saes_fingerprint": saes_fingerprint(saes)}
        made = made_with(self, **of_saes, text=text, features=names)
        dropped = (
            "resume",
            "out",
            "sites",
            "dtype",
            "quantize",
            *(name for name in ("groups", "automata", "prompts") if not getattr(self, name)),
        )
        made = {name: value for name, value in made.items() if name not in dropped}
        finished = self._begin(folder, made, dtype=str(model.dtype).removeprefix("torch."))
        n_tokens = self._pages(model, saes, text, asked, folder, finished)
        if circuit is None or prompts is None:
            (folder / CIRCUIT_FILE).unlink(missing_ok=True)
        else:
            write_circuit_part(folder, circuit, prompts, asked)
        title = circuit.metadata.get("title") if circuit is not None else None
        index = {
            "schema_version": 1,
            "title": f"Features of {title or run.resolve().name}",
            "text": Path(text).name,
            "n_tokens": n_tokens,
            "saes_fingerprint": of_saes["saes_fingerprint"],
            "sites": [site.name for site in asked],
            "all_sites": [site.name for site in saes],
            "features": names,
            "made_with": made,
        }
        write_json(folder / INDEX_FILE, index)
        remove(folder / "partial", PARTIAL_PAGES)
        record(run, "features", self)
        page = write_page(run)
        data = {"out": str(page), "features": len(names), "sites": len(asked), "tokens": n_tokens}
        more = self._groups(model, saes, text, list(asked), folder) if self.groups else ""
        more += self._automata(circuit, model, saes, text, list(asked), folder) if self.automata else ""
        return Output(f"{len(names):,} features at {len(asked)} sites, {n_tokens:,} tokens\n{more}wrote {page}", data)

    def _groups(self, model: LanguageModel, saes: SAEs, text: str, sites: list[Site], folder: Path) -> str:
        """Find groups of features and draw them; what there is to say of them."""
        from sae._progress import ProgressBar
        from sae.features.group_plots import plot_groups
        from sae.features.groups import MOST_TOKENS, find_groups

        n = min(self.options.tokens, MOST_TOKENS)
        with ProgressBar(total=n, desc="groups", unit="token", disable=self.quiet) as bar:
            groups = find_groups(
                model, saes, TextSource.of(text).read(), sites=sites, max_tokens=n, context=self.context_length,
                progress=bar.update,
            )  # fmt: skip
        path = groups.save(folder / "groups.json", overwrite=True)
        picture = plot_groups(groups, folder / "groups.svg", overwrite=True)
        return f"{groups.text()}\nwrote {path} and {picture.name}\n"

    def _automata(
        self, circuit: Circuit | None, model: LanguageModel, saes: SAEs, text: str, sites: list[Site], folder: Path
    ) -> str:
        """Find automata of features and draw them; what there is to say of them."""
        from circuits.feature_pages import draw_automata_of
        from circuits.labels import LabelsFile
        from sae._progress import ProgressBar
        from sae.features.automata import find_automata
        from sae.features.groups import MOST_TOKENS

        n = min(self.options.tokens, MOST_TOKENS)
        with ProgressBar(total=n, desc="automata", unit="token", disable=self.quiet) as bar:
            automata = find_automata(
                model, saes, TextSource.of(text).read(), sites=sites, max_tokens=n, context=self.context_length,
                seed=self.options.seed, progress=bar.update,
            )  # fmt: skip
        path = automata.save(folder / "automata.json", overwrite=True)
        run = folder.parent
        labels = LabelsFile(self.saes, run) if circuit is None else LabelsFile.of(circuit.metadata, run)
        picture = draw_automata_of(automata, folder / "automata.svg", labels.read())
        return f"{automata.text()}\nwrote {path} and {picture.name}\n"

    def _run_folder(self) -> Path:
        """The folder of the run that receives the pages."""
        from circuits.circuit import circuit_folder
        from sae.formats.locate import sae_folders

        if sum(option is not None for option in (self.features, self.sites, self.top)) > 1:
            raise UserError("say which features to show by one of --top, --features and --sites")
        if self.circuit is None and self.saes is None:
            raise UserError("say whose features to show: --circuit with a run folder, or --saes")
        if self.out is not None:
            return self.out
        if self.circuit is not None:
            return circuit_folder(self.circuit).parent
        folder = Path(str(self.saes))
        if not folder.is_dir() or not sae_folders(folder):
            raise UserError(f"{self.saes!r} is no run folder of sfc, so that nothing is written there: give --out")
        return folder.parent if folder.name == "saes" else folder

    def _text(self, run: Path) -> str:
        """The text to read: the option's, or what an earlier command of the run read."""
        if self.text is not None:
            return self.text
        commands = read_run_config(run)
        for command in ("discover", "train"):
            text = commands.get(command, {}).get("text")
            if isinstance(text, str):
                return text
        raise UserError("no text to read: give --text; no earlier command of this run read one")

    def _load(self, run: Path) -> tuple[Circuit | None, LanguageModel, SAEs]:
        from circuits.circuit import Circuit
        from circuits.cli.common import load_checked_saes, load_model, placed

        if self.circuit is not None:
            circuit = Circuit.load(
                self.circuit, model=self.model, saes=self.saes, sae_memory=self.sae_memory, metric="logit_difference",
                **placed(self),
            )  # fmt: skip
            return circuit, circuit.model, circuit.saes
        name = self.model or next(
            (
                entry["model"]
                for entry in read_run_config(run).values()
                if isinstance(entry, dict) and entry.get("model")
            ),
            None,
        )
        if name is None:
            raise UserError("the model is missing: give --model")
        model = load_model(name, self, saes=self.saes)
        return None, model, load_checked_saes(model, str(self.saes), options=self)

    def _prompts(self, circuit: Circuit | None) -> PromptSet | None:
        """The prompts the features are measured on, read before the text, which takes longer."""
        if circuit is None:
            if self.prompts is not None:
                raise UserError("--prompts are for the features of a circuit: give --circuit")
            return None
        return circuit.prompts if self.prompts is None else circuit.read_prompts(self.prompts)

    def _asked(self, circuit: Circuit | None, saes: SAEs) -> dict[Site, list[int]]:
        """The features to show, by site in forward order."""
        from circuits.editing.targets import parse_features
        from sae.model.sites import select_sites

        if self.top is not None and circuit is None:
            raise UserError("only a circuit has strongest features: give --circuit, or --features or --sites")
        given = self.features.split(",") if self.features is not None else []
        if self.top is not None and circuit is not None:
            given = circuit.strongest_features(self.top)
        if given:
            names = [name.strip().partition("@")[0] for name in given if name.strip()]
            return {site: index.tolist() for site, index in parse_features(names, saes).items()}
        if self.sites is not None or circuit is None:
            chosen = select_sites(self.sites or "all", list(saes))
            return {site: list(range(saes.config(site).n_features)) for site in chosen}
        asked = circuit.features_with_edges()
        if not asked:
            raise UserError("the circuit has no features, only errors: name some with --features or --sites")
        return asked

    def _begin(self, folder: Path, made: dict[str, Any], *, dtype: str) -> list[str]:
        """Make the folder ready; the sites that an interrupted reading, in the same number type, has finished."""
        from circuits.feature_pages import INDEX_FILE

        partial = folder / "partial" / STATE_FILE
        if self.resume and not partial.is_file() and (folder / INDEX_FILE).is_file():
            raise UserError(f"nothing to resume in {str(folder)!r}: its pages are finished; --overwrite begins again")
        if self.resume and partial.is_file():
            if differing := different_options(read_json(partial), {**made, "dtype": dtype}):
                raise UserError(f"the reading in {str(folder)!r} was begun with other options: {differing}")
            return [path.stem for path in folder.glob("*.jsonl")]
        if partial.is_file() and not self.overwrite:
            raise UserError(
                f"{str(folder)!r} holds an interrupted reading: go on with --resume, or start again with --overwrite"
            )
        index = folder / INDEX_FILE
        if index.is_file() and not self.overwrite and (differing := different_options(read_json(index), made)):
            raise UserError(f"{str(folder)!r} holds pages of other options ({differing}): --overwrite replaces them")
        remove(folder, FEATURES, with_folder=False)
        write_json(partial, {"schema_version": 1, MADE_WITH: {**made, "dtype": dtype}})
        return []

    def _pages(
        self, model: LanguageModel, saes: SAEs, text: str, asked: dict[Site, list[int]], folder: Path,
        finished: list[str],
    ) -> int:  # fmt: skip
        """Write the data of every site; the number of tokens that count."""
        from circuits.feature_pages import tokens_read, write_site
        from sae._progress import ProgressBar
        from sae.features.pages import feature_pages_by_site

        n_tokens = 0
        with ProgressBar(total=self.options.tokens, desc="features", unit="token", disable=self.quiet) as bar:
            sites = feature_pages_by_site(
                model, saes, TextSource.of(text).read(), asked, self.options, context=self.context_length,
                progress=bar.update, partial=folder / "partial", finished=[s for s in asked if s.name in finished],
            )  # fmt: skip
            for site, pages in sites:
                bar.set_postfix_str(f"{site} with its features ablated")
                write_site(folder, site, pages)
                n_tokens = pages[0].n_tokens
        return n_tokens or tokens_read(folder / f"{next(iter(asked))}.jsonl")  # every site was finished before
