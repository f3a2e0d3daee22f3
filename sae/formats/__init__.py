"""Autoencoders of other projects, read into our contract and written back: one file per format.

`load_sae` takes a folder, a file or a hub path and recognises the format by its files. Whatever the format, what comes
back has unit decoder rows, works on raw activations and gives the x̂ that its owners' code gives; f_i is theirs times
the norm of their decoder row. What cannot be read rightly is refused with a sentence, never approximated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from sae._files import names_in
from sae._run.contents import check_complete
from sae._run.outputs import IsOwn, check_output
from sae.autoencoder import SAE_CONFIG_FILE, WEIGHTS_FILE, SAEConfig, SparseAutoencoder, is_own
from sae.errors import UserError, unknown
from sae.formats import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    llama_scope,
    openai,
    qwen_scope,
    saelens,
    sparsify,
    transcoder_circuits,
)  # fmt: skip
from sae.formats.common import check_same, staged
from sae.formats.locate import local_path
from sae.formats.refusals import refuse_no_autoencoder
from sae.formats.site_names import EMBED_HOOKS
from sae.model.huggingface import resolve_device
from sae.model.sites import Site


@dataclass(frozen=True)
class Format:
    """A format that can be read."""

    name: str
    """Its name, for messages."""
    files: tuple[str, ...]
    """The files that a folder of it has."""
    read: Callable[[Path], SparseAutoencoder]
    """Reads the autoencoder in a folder or file."""
    file: str = ""
    """Regular expression of the name of a file that is an autoencoder by itself."""
    shown: str = "LAYER.pt"
    """Such a name, for messages."""

    def recognises(self, path: Path) -> bool:
        """Whether a folder or file is in it."""
        if path.is_file():
            return re.fullmatch(self.file, path.name) is not None
        return self.files != () and all((path / name).is_file() for name in self.files)


FORMATS = (
    Format("ours", (SAE_CONFIG_FILE, WEIGHTS_FILE), SparseAutoencoder.load),
    Format("dictionary_learning", ("ae.pt",), dictionary_learning.read, r"ae_\d+\.pt"),
    Format("SAELens", ("cfg.json", "sae_weights.safetensors"), saelens.read),
    Format("sparsify", ("cfg.json", "sae.safetensors"), sparsify.read),
    Format("Gemma Scope", ("params.npz",), gemma_scope.read),
    Format("Gemma Scope 2", ("params.safetensors",), gemma_scope.read),
    Format("Llama Scope", ("hyperparams.json",), llama_scope.read),
    Format("circuit-tracer", (), circuit_tracer.read, circuit_tracer.FILE, "layer_N.safetensors"),
    Format("Qwen Scope", (), qwen_scope.read, qwen_scope.FILE, "layerN.sae.pt"),
    Format(
        "transcoder_circuits", (), transcoder_circuits.read, transcoder_circuits.FILE, "final_sparse_autoencoder_*.pt"
    ),
    Format("OpenAI", (), openai.read, r".*\.pt"),
)
WrittenFormat = Literal["ours", "saelens", "dictionary_learning", "circuit_tracer"]
WRITERS: dict[str, Callable[[SparseAutoencoder, Path], object]] = {
    "ours": lambda sae, folder: sae.save(folder),  # that of the autoencoder's own class
    "saelens": saelens.write,
    "dictionary_learning": dictionary_learning.write,
    "circuit_tracer": circuit_tracer.write,
}

IS_OWN: dict[str, IsOwn] = {
    "ours": is_own, "saelens": saelens.is_own, "dictionary_learning": dictionary_learning.is_own,
    "circuit_tracer": circuit_tracer.is_own,
}  # fmt: skip
"""By format: whether a file in a folder is what its writer left there."""


def load_sae(
    source: str | Path, *, site: str | Site | None = None, device: str | torch.device = "auto"
) -> SparseAutoencoder:
    """Load one autoencoder in any known format.

    Args:
        source: a folder, a file, or `owner/repository[/folder][@revision]` on the Hugging Face hub.
        site: picks one where there are several, and says where it belongs if its files do not.
        device: where its tensors go: a device, or "auto" for cuda, mps or cpu, whichever is there first.

    Returns:
        The autoencoder, with unit decoder rows, on raw activations, and with the x̂ that its owners' code gives; its
        features are theirs times the norm of their decoder row.

    Raises:
        UserError: nothing is there, the files are damaged, or they hold something that is no autoencoder of one site.
    """
    name = "" if site is None else Site.parse(site).name
    check_complete(source)
    return read_folder(local_path(source, site=name), name).to(resolve_device(device))


def save_sae(
    sae: SparseAutoencoder, folder: str | Path, *, file_format: WrittenFormat = "ours", overwrite: bool = False
) -> Path:
    """Write a dictionary in our format, SAELens' or dictionary_learning's, a transcoder in circuit-tracer's as well, so
    that their code gives the same x̂.

    What is written is read back and compared.

    Args:
        sae: the autoencoder.
        folder: where its files go.
        file_format: "ours", "saelens", "dictionary_learning" or "circuit_tracer".
        overwrite: whether files of the same names are replaced that this program did not write.

    Returns:
        The folder.

    Raises:
        UserError: the format does not hold such an autoencoder (nothing is left behind), or its files would replace
            another program's.
    """
    return save_saes({Path(folder): sae}, file_format=file_format, overwrite=overwrite)[0]


def save_saes(
    saes: Mapping[Path, SparseAutoencoder], *, file_format: WrittenFormat, overwrite: bool = False
) -> list[Path]:
    """Write autoencoders to their folders as `save_sae` does: all of them or none."""
    if file_format not in WRITERS:
        raise unknown("format to write", file_format, WRITERS)
    with ExitStack() as written:
        for folder, sae in saes.items():
            temporary = written.enter_context(staged(folder))
            WRITERS[file_format](sae, temporary)
            layer = next(temporary.glob("layer_*.safetensors"), temporary)
            check_same(sae, read_folder(layer).to(sae.device), file_format)
            for path in temporary.iterdir():
                check_output(folder / path.name, IS_OWN[file_format], overwrite=overwrite)
    return list(saes)


def read_folder(path: Path, site: str = "") -> SparseAutoencoder:
    """The autoencoder in a folder or file of any known format; `site` is where it belongs if its files do not say."""
    for file_format in FORMATS:
        if file_format.recognises(path):
            return _placed(file_format.read(path), site, str(path))
    refuse_no_autoencoder(path)
    names = names_in(path) if path.is_dir() else path.name
    formats = "; ".join(f"{' + '.join(f.files) or f.shown} ({f.name})" for f in FORMATS)
    raise UserError(f"no autoencoder in {str(path)!r}: looked for {formats}; found {names}")


def _placed(sae: SparseAutoencoder, site: str, source: str) -> SparseAutoencoder:
    """The autoencoder with the site the user gave, which must not contradict its files."""
    hook = str(sae.config.extra.get("hook", ""))
    if site and not sae.config.site and (hook.startswith("blocks.") or hook in EMBED_HOOKS):
        raise UserError(f"the autoencoder at {source!r} belongs to {hook}, which is no site here")
    if site and sae.config.site and sae.config.site != site:
        raise UserError(f"the autoencoder at {source!r} belongs to site {sae.config.site}, not to {site}")
    if site:
        sae.config = replace(sae.config, site=site)
    return sae


def site_of(config: SAEConfig, source: str) -> Site:
    """The site that the files at `source` say their autoencoder belongs to."""
    if not config.site:
        raise UserError(f"nothing at {source!r} says which site its autoencoder belongs to: load it alone, with a site")
    return Site.parse(config.site)
