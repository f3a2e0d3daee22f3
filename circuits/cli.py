"""The command `sfc`.

Every subcommand is a dataclass in `circuits.commands` whose fields are its options and whose `run` does the work. A
mistake of the user's ends with exit status 2 and one sentence, a failure with 1, and Ctrl-C with 130.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from graphs.errors import GraphError
from sae.errors import UserError


def _commands() -> dict[str, Any]:
    """Subcommands by name."""
    from circuits.commands.cache import Cache
    from circuits.commands.compare import CompareMethods
    from circuits.commands.convert import Convert
    from circuits.commands.demo import Demo
    from circuits.commands.discover import Discover
    from circuits.commands.edit import Ablate, Steer
    from circuits.commands.evaluate import Evaluate
    from circuits.commands.export import Export
    from circuits.commands.faithfulness import Faithfulness
    from circuits.commands.finetune import Finetune
    from circuits.commands.mask import Mask
    from circuits.commands.match import Match
    from circuits.commands.probe import Probe
    from circuits.commands.render import Explore, Render
    from circuits.commands.report import Report
    from circuits.commands.sweep import Sweep
    from circuits.commands.train import Train

    return {
        "train": Train,
        "finetune": Finetune,
        "sweep": Sweep,
        "cache": Cache,
        "evaluate": Evaluate,
        "match": Match,
        "convert": Convert,
        "discover": Discover,
        "faithfulness": Faithfulness,
        "mask": Mask,
        "probe": Probe,
        "compare-methods": CompareMethods,
        "render": Render,
        "explore": Explore,
        "export": Export,
        "ablate": Ablate,
        "steer": Steer,
        "report": Report,
        "demo": Demo,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `sfc` with command-line arguments, those of the process by default; always ends with SystemExit.

    Idle threads sleep unless the environment says otherwise: where cores are shared, spinning costs ten times the work.
    What Apple's GPUs cannot do, the CPU does. Both must be set before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            _commands(),
            prog="sfc",
            description="Find, draw and edit sparse feature circuits in language models.",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
        output = command.run()
    except (UserError, GraphError) as error:
        _leave(f"sfc: {error}", 2)
    except KeyboardInterrupt:
        _leave("sfc: interrupted; what was finished is on disk", 130)
    except OSError as error:
        _leave(f"sfc: {error}", 1)
    sys.stdout.write((json.dumps(output.data) if command.json else output.text) + "\n")
    sys.exit(0)


def _leave(message: str, status: int) -> None:
    sys.stderr.write(message + "\n")
    sys.exit(status)
