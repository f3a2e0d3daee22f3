"""The command `sfc`, and what it does to its own process.

Every subcommand is a dataclass whose fields are its options and whose `run` does the work; only the file of the one
that is asked for is imported. A mistake of the user's ends with exit status 2 and one sentence, a failure with 1, and
Ctrl-C with 130.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from circuits.cli.streams import Printable, prepare_streams, printable, say, say_error, to_nowhere
from graphs.errors import GraphError
from sae._run import processes
from sae.errors import UserError, did_you_mean, nearest
from sae.training.stopping import terminated_as_interrupted

if TYPE_CHECKING:
    from circuits.cli.options import Output

GROUPS = {
    "Dictionaries": {
        "train": ("dictionaries.train", "TrainCommand", "train autoencoders at the sites of a model"),
        "finetune": ("dictionaries.finetune", "FinetuneCommand", "tune them together, all of them in the model"),
        "sweep": ("dictionaries.sweep", "SweepCommand", "train a grid of them, and plot fidelity against sparsity"),
        "cache": ("dictionaries.cache", "CacheCommand", "write activations to disk, for several trainings"),
        "evaluate": ("dictionaries.evaluate", "EvaluateCommand", "how well they stand for the model's activations"),
        "match": ("dictionaries.match", "MatchCommand", "find the same features in two dictionaries"),
        "saes": ("dictionaries.saes", "SaesCommand", "list released dictionaries, by the names that --saes takes"),
        "convert": ("dictionaries.convert", "ConvertCommand", "write them in SAELens' or dictionary_learning's format"),
    },
    "Circuits": {
        "discover": ("circuits.discover", "DiscoverCommand", "find the circuit behind a set of prompts"),
        "behaviours": ("circuits.behaviours", "BehavioursCommand", "find behaviours nobody listed, a circuit for each"),
        "probe": ("circuits.probe", "ProbeCommand", "learn a linear probe to be the metric of a circuit"),
        "attention": ("circuits.attention", "AttentionCommand", "why heads look there: features behind their scores"),
    },
    "Tests": {
        "faithfulness": (
            "tests.faithfulness",
            "FaithfulnessCommand",
            "how much of the behaviour a circuit explains alone",
        ),
        "validate": ("tests.validate", "ValidateCommand", "how far to trust a circuit, a verdict a line"),
        "mask": ("tests.mask", "MaskCommand", "learn which nodes to keep, beside the ranking by effects"),
        "compare-methods": (
            "tests.compare",
            "CompareMethodsCommand",
            "node methods beside each other on held-out prompts",
        ),
        "compare-circuits": (
            "tests.circuits",
            "CompareCircuitsCommand",
            "whether circuits of tasks or seeds are one mechanism",
        ),
    },
    "Pictures": {
        "render": ("pictures.render", "RenderCommand", "draw a circuit: svg, png, pdf or dot"),
        "features": (
            "pictures.features",
            "FeaturesCommand",
            "a page for every feature: when it is on and what it does",
        ),
        "explore": ("pictures.render", "ExploreCommand", "write it as one interactive page"),
        "serve": ("pictures.serve", "ServeCommand", "try edits on your own prompts, in the browser"),
        "report": ("pictures.report", "ReportCommand", "everything a run found, on one page"),
        "labels": ("pictures.labels", "LabelsCommand", "name features, for all circuits of their autoencoders"),
        "supernodes": ("pictures.supernodes", "SupernodesCommand", "group features that do the same, to be one"),
        "export": ("pictures.export", "ExportCommand", "write it for Neuronpedia, circuit-tracer, EAP-IG or networkx"),
    },
    "Edits": {
        "ablate": ("edits.edit", "AblateCommand", "take features out of the model, and measure what is left"),
        "steer": ("edits.edit", "SteerCommand", "push the model along features"),
        "shift": ("edits.shift", "ShiftCommand", "take from a probe the features it should not use"),
        "tpp": ("edits.shift", "TppCommand", "are the features of a class of that class alone?"),
        "test": ("edits.suite", "TestCommand", "behaviours listed in a YAML file, with pass and fail"),
    },
    "All of it": {
        "demo": ("demo", "DemoCommand", "the whole story on the bundled model, in a few minutes"),
    },
}
"""Name of a command -> (file in `circuits/cli/commands`, class, what it does), in groups by the story."""
COMMANDS = {name: entry for group in GROUPS.values() for name, entry in group.items()}
SHARED = ("train", "discover")
"""Commands whose work several processes can share."""
RESUMABLE = ("train", "finetune", "sweep", "cache", "discover", "behaviours", "features")
"""Commands that go on with `--resume`."""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc")
"""What torch's errors say where there is no more memory."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's mallopt options."""


def command_class(name: str) -> type[Any]:
    """The dataclass of a subcommand; raises UserError for a name that is none."""
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{did_you_mean(nearest(name, COMMANDS, n=1))} (see sfc --help)")
    module, cls, _ = COMMANDS[name]
    return getattr(importlib.import_module(f"circuits.cli.commands.{module}"), cls)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `sfc` with command-line arguments, those of the process by default; always ends with SystemExit."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    prepare_streams()
    _prepare_process(words)
    status = 0
    try:
        _check_words(words)
        if not words or words[0] in ("-h", "--help"):
            say(overview())
        else:
            with terminated_as_interrupted():
                status = _run(words)
    except (UserError, GraphError) as error:
        _leave(f"sfc: {error}", 2)
    except KeyboardInterrupt:
        way_on = ": go on with --resume and the same options" if words and words[0] in RESUMABLE else ""
        _leave(f"sfc: interrupted; what was finished is on disk{way_on}", 130)
    except BrokenPipeError:  # the reader of a help page has gone
        to_nowhere()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            _leave(f"sfc: {str(error.filename)[:40]!r}... is too long for the name of a file or folder", 2)
        _leave(f"sfc: {error}", 1)
    except (MemoryError, RuntimeError, ImportError) as error:
        if (message := _of_the_machine(error)) is None:
            raise
        _leave(f"sfc: {message}", 1)
    sys.exit(status)


def overview() -> str:
    """All commands, one a line, in groups by the story."""
    lines = ["Find, draw and edit sparse feature circuits in language models."]
    lines += ["usage: sfc COMMAND [OPTIONS]     sfc COMMAND --help explains every option", ""]
    for group, commands in GROUPS.items():
        lines += [group, *(f"  {name:<18}{does}" for name, (_, _, does) in commands.items())]
    return "\n".join(lines) + "\n"


def _run(words: Sequence[str]) -> int:
    """Run a command; its exit status."""
    from circuits.cli.parser import parse
    from sae._options import check_options

    command = parse(command_class(words[0]), words[1:], prog=f"sfc {words[0]}")
    check_options(command)
    n = processes.to_launch(command.processes) if words[0] in SHARED else 0
    if n or processes.launched():
        _check_shared(words[0], command)
    if n:
        return processes.launch(words, n)
    _keep_freed_memory()
    if not processes.launched():
        return _say(command.run(), as_json=command.json)
    with processes.joined(command.device) as others:
        output = command.run()
        return _say(output, as_json=command.json) if others.is_first else 0


def _check_shared(name: str, command: Any) -> None:
    """UserError for a command, or an option of it, that several processes do not share."""
    if name not in SHARED:
        raise UserError(f"sfc {name} runs in one process, not by torchrun: only {' and '.join(SHARED)} share work")
    if (option := command.for_one_process()) is not None:
        raise UserError(f"{option}, which is for one process: leave out --processes, or torchrun")


def _say(output: Output, *, as_json: bool) -> int:
    """Print what a command has to say; its exit status."""
    say((json.dumps(output.data) if as_json else printable(output.text)) + "\n")
    return int(output.failed)


def _prepare_process(words: Sequence[str]) -> None:
    """Set what must be set before torch and transformers are imported, unless the environment says otherwise.

    Idle threads sleep: where cores are shared, spinning costs ten times the work. What Apple's GPUs cannot do, the CPU
    does. Libraries draw no bars of their own where nobody watches, or another process draws them.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    if "--json" in words or not sys.stderr.isatty() or not processes.speaks():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Printable("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def _keep_freed_memory() -> None:
    """Have the C library hand freed blocks out again instead of returning them to the system (glibc only).

    Blocks up to 256 MB come from the heap, and up to 1 GB of its free end stays. A training step frees and takes the
    same gradients again and again: it costs a twentieth of a TopK step otherwise.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        mallopt = ctypes.CDLL(None).mallopt
        if not mallopt(M_MMAP_THRESHOLD, 2**28):
            mallopt(M_MMAP_THRESHOLD, 2**25)  # older versions refuse more than 32 MB
        mallopt(M_TRIM_THRESHOLD, 2**30)


def _check_words(words: Sequence[str]) -> None:
    """Paths whose bytes are no text cannot be written down in a run's files."""
    for word in words:
        if any("\ud800" <= character <= "\udfff" for character in word):
            shown = word.encode(errors="surrogateescape").decode(errors="backslashreplace")
            raise UserError(f"the argument '{shown}' is not UTF-8 text: give files and folders names that are")


def _of_the_machine(error: Exception) -> str | None:
    """A sentence for memory that ran out or a library that cannot be loaded; None for any other error."""
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, ImportError):
        return f"a library cannot be loaded: {text}"
    if isinstance(error, MemoryError) or any(part in str(error).lower() for part in OUT_OF_MEMORY):
        return (
            f"memory ran out ({text or 'no more can be had'}): give a smaller --memory, batch or number of features, "
            "or free some; what was finished is on disk"
        )
    return None


def _leave(message: str, status: int) -> None:
    """End with a sentence, which one of several processes says."""
    is_first, status = processes.failed(status)
    if is_first:
        say_error(printable(message) + "\n")
    sys.exit(status)
