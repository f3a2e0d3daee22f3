"""What all writers share: our tensors in the conventions of a format that has no place for ours, and a look at them.

Whatever is written is read back and tried: an autoencoder that a format does not hold is refused, not approximated.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from sae._files import make_folder, temporary_name
from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError

TRIED_ROWS = 64
TOLERANCE = 1e-4
"""Largest difference of x̂ that counts as rounding, relative to x and x̂."""
OTHERWISE_ACTIVE = 1 / 16
"""Share of the rows that may differ more: rounding turns a feature on or off that is just at its threshold."""


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, whose files go there when the block ends without an error, else nowhere."""
    make_folder(folder.parent)
    temporary = temporary_name(folder)
    try:
        yield make_folder(temporary)
        make_folder(folder)
        for path in sorted(temporary.iterdir()):
            path.replace(folder / path.name)
    except OSError as error:
        raise UserError(f"cannot write {str(folder)!r}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@torch.no_grad()
def check_same(sae: SparseAutoencoder, written: SparseAutoencoder, file_format: str) -> None:
    """`UserError` unless what was written gives the same x̂ as the autoencoder, on rows of all sizes."""
    x = _trial_rows(sae)
    x_hat, again = sae(x), written(x)
    size = x.norm(dim=-1) + x_hat.norm(dim=-1)  # [n]
    differ = ~((x_hat - again).norm(dim=-1) <= TOLERANCE * size.clamp(min=torch.finfo(x.dtype).tiny))
    if int(differ.sum()) > OTHERWISE_ACTIVE * len(x):
        raise UserError(
            f"the autoencoder of site {sae.config.site!r} cannot be written as {file_format}: read back it gives other "
            f"reconstructions on {int(differ.sum())} of {len(x)} rows; nothing was left of it"
        )


def _trial_rows(sae: SparseAutoencoder) -> Tensor:
    """[n, d] activations that make features active, from small to large, the same every time."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(len(sae.W_dec), (TRIED_ROWS, 2), generator=generator).to(sae.device)
    noise = torch.randn(TRIED_ROWS, sae.config.d_model, generator=generator).to(sae.device)
    directions = sae.W_dec[pairs].sum(1) + noise / sae.config.d_model**0.5
    return sae.b_dec + torch.logspace(-1, 2, TRIED_ROWS, device=sae.device)[:, None] * directions


def plain_tensors(sae: SparseAutoencoder, *, subtract_b_dec: bool) -> dict[str, Tensor]:
    """Tensors that give the same x̂ when b_dec is subtracted from the input, or when it is not.

    1. W (x − b_dec) + b = W x + (b − W b_dec): the biases take up the difference, that of the gate too.
    2. A top-k selection that goes by activations before the decoder was normalised (`rank_scale` r) gets the old
       decoder back: W_dec / r, W_enc · r, b_enc · r. Then f is the format's, not f · ‖W_dec‖.
    """
    tensors = {name: tensor.detach().cpu().double() for name, tensor in sae.named_buffers()}
    if sae.config.subtract_b_dec != subtract_b_dec:
        shift = tensors["W_enc"] @ tensors["b_dec"]  # [F]
        if not subtract_b_dec:
            shift = -shift
        if "gate_bias" in tensors:
            tensors["gate_bias"] = tensors["gate_bias"] + shift
        tensors["b_enc"] = tensors["b_enc"] + shift * tensors.get("magnitude", torch.ones(()))
    if "rank_scale" in tensors:
        scale = tensors.pop("rank_scale")
        tensors["W_dec"] = tensors["W_dec"] / scale[:, None]
        tensors["W_enc"] = tensors["W_enc"] * scale[:, None]
        tensors["b_enc"] = tensors["b_enc"] * scale
    return {name: tensor.float() for name, tensor in tensors.items()}


def unsupported(sae: SparseAutoencoder, file_format: str) -> UserError:
    """The format has no such architecture."""
    return UserError(
        f"{file_format} has no class for a {sae.config.architecture!r} autoencoder: save it in our own format"
    )
