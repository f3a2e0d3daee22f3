"""Options that commands share, each with its one sentence, and what a command has to say.

The same sentences are `--help`, `config.json` and documentation. Nothing here, nor at the head of a command's file,
imports torch: `sfc COMMAND --help` answers at once, and `run` imports what it needs.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from sae._files import without_nan
from sae._options import Positive, Range
from sae._run.processes import current
from sae.errors import UserError


@dataclass(frozen=True)
class Output:
    """The result of a command, for a person and for a machine."""

    text: str
    """For a person."""
    data: dict[str, Any]
    """For a machine: one JSON object; undefined numbers are null."""
    failed: bool = False
    """Whether what was tested has failed: the exit status is 1 then."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", without_nan(self.data))


@dataclass(frozen=True, kw_only=True)
class Prints:
    """How every command prints its result."""

    json: bool = False
    """Print one JSON object instead of text."""

    @property
    def quiet(self) -> bool:
        """Whether progress is left out."""
        return self.json or not current().is_first


@dataclass(frozen=True, kw_only=True)
class Common(Prints):
    """Options of every command that runs the model."""

    device: str = "auto"
    """Where the model runs: auto (cuda, mps or cpu, whichever is there first), or a device such as cuda:1."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Precision of the model's weights: by default that of the circuit a command works on, else float32; auto is
    float32, on a GPU the files' own from 2 billion parameters on.
    """
    device_map: str | None = None
    """Spread the model over devices, main memory and disk with accelerate, in place of --device: auto, balanced,
    balanced_low_0 or sequential, disk, or modules, such as model.embed_tokens=cuda:0,model.layers=cuda:1,...
    """
    quantize: Literal["8bit", "4bit"] | None = None
    """Hold the weights of linear layers in 8 or 4 bits with bitsandbytes; by default as the circuit a command works on
    has it. Other weights and activations have --dtype.
    """
    remote: str | None = None
    """Run the model elsewhere through nnsight: ndif (the key is NDIF_API_KEY), the address of another server of
    nnsight, or local, its simulation of one. Only activations and gradients travel.
    """
    site_paths: str | None = None
    """Where sites are in a model whose architecture is not known, or elsewhere than usual, such as
    resid=model.layers.{layer},attn=model.layers.{layer}.self_attn.o_proj:input.
    """


@dataclass(frozen=True, kw_only=True)
class UsesSaes(Common):
    """Options of commands that can read autoencoders one by one."""

    sae_memory: Annotated[float, Range(0, 10**6)] | None = None
    """Memory for autoencoders in GiB: where they do not fit they are read from disk whenever their site is at work.
    Half of what is free by default.
    """


@dataclass(frozen=True, kw_only=True)
class SharesWork:
    """Options of commands whose work several processes can share."""

    processes: Annotated[int, Range(1, 1024)] | None = None
    """Processes of this machine that share the work, each with a GPU of its own where there are GPUs: calls torchrun,
    which also starts them on several machines.
    """

    def for_one_process(self) -> str | None:
        """An option that was given and whose work is not shared, such as "estimate is on"."""
        return None


@dataclass(frozen=True, kw_only=True)
class HasModel:
    """A model by name."""

    model: str
    """Hugging Face model: hub name or folder."""


@dataclass(frozen=True, kw_only=True)
class HasText:
    """A text to read."""

    text: str
    """Text: a .txt file (a document a line), a .jsonl file (field text), .gz of either, or a hub data set."""


@dataclass(frozen=True, kw_only=True)
class HasTextOrCache:
    """A model and a text, or activations that were written to disk before."""

    model: str | None = None
    """Hugging Face model: hub name or folder. With --cache, by default the one the cache was made with."""
    text: str | None = None
    """Text: a .txt file (a document a line), a .jsonl file (field text), .gz of either, or a hub data set. With
    --cache, by default what the cache was made from.
    """
    cache: Path | None = None
    """Folder of `sfc cache` to read activations from; the model is not run to train then."""


@dataclass(frozen=True, kw_only=True)
class HasSites:
    """A choice of sites."""

    sites: str = "all"
    """Sites, such as all, resid or resid_3,mlp_2."""


@dataclass(frozen=True, kw_only=True)
class HasSaes:
    """Autoencoders by where they are."""

    saes: str
    """Autoencoders: a run folder (`sfc train`) or the folder inside it; dictionaries of another project in a folder, on
    the hub as owner/repository/folder, or by a name that `sfc saes` lists, several between commas; neurons, or
    mlp-neurons for those inside the MLPs.
    """
    width: str | None = None
    """Of a set with several widths, such as Gemma Scope: how many features, 16k or 16384."""
    l0: str | None = None
    """Of a set with several sparsities: small, medium or big, or a number, of which the nearest is taken."""

    def __post_init__(self) -> None:
        from sae.formats.sets import with_choice

        if self.width or self.l0:  # the name of the set says it from here on, in circuits too
            object.__setattr__(self, "saes", with_choice(self.saes, width=self.width, l0=self.l0))


@dataclass(frozen=True, kw_only=True)
class HasCircuit:
    """A circuit on disk."""

    circuit: Path
    """Run folder with a circuit (`sfc discover`)."""


@dataclass(frozen=True, kw_only=True)
class RunsCircuit(Common, HasCircuit):
    """A circuit on disk whose model is run."""

    model: str | None = None
    """Another place of the model the circuit was found in."""
    saes: str | None = None
    """Another place of the autoencoders the circuit was found with."""
    metric: str | None = None
    """The circuit's metric again, where it is Python code (file.py:function): no code runs because a run names it."""


@dataclass(frozen=True, kw_only=True)
class HasTestPrompts:
    """Prompts that a circuit is tested on."""

    prompts: str | None = None
    """Prompts to measure on; those the circuit was found on by default."""
    examples: Positive | None = None
    """At most this many of the prompts; all by default."""


@dataclass(frozen=True, kw_only=True)
class HasSizes:
    """Sizes of circuits."""

    sizes: str = "10,20,50,100,200,500,1000"
    """Numbers of nodes, comma-separated."""


@dataclass(frozen=True, kw_only=True)
class Overwrites:
    """Leave to replace files."""

    overwrite: bool = False
    """Replace what an earlier run of this command left in the output folder; of a command that writes one file,
    whatever has its name.
    """


@dataclass(frozen=True, kw_only=True)
class Named(Overwrites):
    """Options of commands that add a result to a run."""

    name: str | None = None
    """Name of the result, which becomes part of its files' names; results of other options stay beside it."""

    def check_name(self) -> None:
        """Raise UserError for a name that cannot be part of a file's name."""
        if self.name is not None and not re.fullmatch(r"\w[\w.+=@-]{0,79}", self.name):
            raise UserError(
                f"name is {self.name[:100]!r}: allowed are up to 80 letters, digits and _ . + = @ -, beginning with a "
                "letter or digit; it becomes part of file names"
            )


def need(value: str | None, option: str) -> str:
    """The value of an option that only `--cache` makes superfluous; UserError where it is missing."""
    if value is None:
        raise UserError(f"--{option} is missing: give it, or --cache with a folder that `sfc cache` wrote")
    return value


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "__dataclass_fields__"):
        return {key: plain(entry) for key, entry in asdict(value).items()}
    return list(value) if isinstance(value, tuple) else value
