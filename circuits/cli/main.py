"""The command `sfc`.

Every subcommand is a dataclass in `circuits.cli` whose fields are its options and whose `run` does the work. A
mistake of the user's ends with exit status 2 and one sentence, a failure with 1, and Ctrl-C with 130.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from circuits.cli.streams import Printable, prepare_streams, printable, say, say_error
from graphs.errors import GraphError
from sae._options import check_options
from sae.errors import UserError
from sae.training.stopping import terminated_as_interrupted

RESUMABLE = ("train", "finetune", "sweep", "cache", "discover")
"""Commands that go on with `--resume`."""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc")
"""What torch's errors say where there is no more memory."""


def _commands() -> dict[str, Any]:
    """Subcommands by name."""
    from circuits.cli.cache import CacheCommand
    from circuits.cli.common import show_ranges
    from circuits.cli.compare import CompareMethodsCommand
    from circuits.cli.convert import ConvertCommand
    from circuits.cli.demo import DemoCommand
    from circuits.cli.discover import DiscoverCommand
    from circuits.cli.edit import AblateCommand, SteerCommand
    from circuits.cli.evaluate import EvaluateCommand
    from circuits.cli.export import ExportCommand
    from circuits.cli.faithfulness import FaithfulnessCommand
    from circuits.cli.finetune import FinetuneCommand
    from circuits.cli.mask import MaskCommand
    from circuits.cli.match import MatchCommand
    from circuits.cli.probe import ProbeCommand
    from circuits.cli.render import ExploreCommand, RenderCommand
    from circuits.cli.report import ReportCommand
    from circuits.cli.sweep import SweepCommand
    from circuits.cli.train import TrainCommand

    commands: dict[str, Any] = {
        "train": TrainCommand,
        "finetune": FinetuneCommand,
        "sweep": SweepCommand,
        "cache": CacheCommand,
        "evaluate": EvaluateCommand,
        "match": MatchCommand,
        "convert": ConvertCommand,
        "discover": DiscoverCommand,
        "faithfulness": FaithfulnessCommand,
        "mask": MaskCommand,
        "probe": ProbeCommand,
        "compare-methods": CompareMethodsCommand,
        "render": RenderCommand,
        "explore": ExploreCommand,
        "export": ExportCommand,
        "ablate": AblateCommand,
        "steer": SteerCommand,
        "report": ReportCommand,
        "demo": DemoCommand,
    }
    for command in commands.values():
        show_ranges(command)
    return commands


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `sfc` with command-line arguments, those of the process by default; always ends with SystemExit.

    Idle threads sleep unless the environment says otherwise: where cores are shared, spinning costs ten times the work.
    What Apple's GPUs cannot do, the CPU does. Both must be set before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    prepare_streams()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Printable("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        _check_words(words)
        with terminated_as_interrupted():
            command = tyro.extras.subcommand_cli_from_dict(
                _commands(),
                prog="sfc",
                description="Find, draw and edit sparse feature circuits in language models.",
                args=words,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
            check_options(command)
            output = command.run()
            say((json.dumps(output.data) if command.json else printable(output.text)) + "\n")
    except (UserError, GraphError) as error:
        _leave(f"sfc: {error}", 2)
    except KeyboardInterrupt:
        _leave(f"sfc: interrupted; what was finished is on disk{_way_on(words)}", 130)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            _leave(f"sfc: {str(error.filename)[:40]!r}... is too long for the name of a file or folder", 2)
        _leave(f"sfc: {error}", 1)
    except (MemoryError, RuntimeError, ImportError) as error:
        if (message := _of_the_machine(error)) is None:
            raise
        _leave(f"sfc: {message}", 1)
    sys.exit(0)


def _check_words(words: Sequence[str]) -> None:
    """Paths whose bytes are no text cannot be written down in a run's files."""
    for word in words:
        if any("\ud800" <= character <= "\udfff" for character in word):
            shown = word.encode(errors="surrogateescape").decode(errors="backslashreplace")
            raise UserError(f"the argument '{shown}' is not UTF-8 text: give files and folders names that are")


def _way_on(words: Sequence[str]) -> str:
    return ": go on with --resume and the same options" if words and words[0] in RESUMABLE else ""


def _of_the_machine(error: Exception) -> str | None:
    """What to say where memory ran out or a library cannot be loaded; None for any other error."""
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
    say_error(printable(message) + "\n")
    sys.exit(status)
