"""The sparse autoencoder as everyone but its trainer sees it, and the transcoder, which reads elsewhere than it writes.

1. z = W_enc (x − b_dec) + b_enc, or without the subtraction (`SAEConfig.subtract_b_dec`);
2. f = nonlinearity(z), chosen by `SAEConfig.architecture` (see `sae.activation_functions`);
3. x̂ = f W_dec + b_dec, with unit decoder rows, so that f_i is the length of what feature i writes.

A transcoder (Dunefsky et al. 2024, arXiv 2406.11944) is the same with an x that is read before the MLP
(`SAEConfig.read`) and a ŷ that stands for what the MLP writes; it may have a skip connection (Paulo et al. 2025, arXiv
2501.18823): ŷ = f W_dec + b_dec + W_skip x. An autoencoder is the case that both places are the same.

It works on raw activations: whatever scaling training used is folded into the tensors. On disk it is a folder with
`config.json` and `sae.safetensors`. Shapes: N tokens, d width of what is written, r of what is read, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sae._files import TensorSpec, check_type, names_in, read_json, read_tensors, write_json, write_tensors
from sae._run.outputs import check_output, like
from sae.activation_functions import CORE, IDENTITY, TOPK, ActivationFunction, top_features
from sae.architectures import nonlinearity
from sae.errors import UserError, unknown
from sae.model.sites import READ_KINDS, Site

ReadKind = Literal["mlp_resid", "mlp_norm", "mlp_in", "mlp_hidden"]
SKIP = "W_skip"
"""The tensor of a skip connection, [d, r]."""
SCHEMA_VERSION = 1
CHUNK_BYTES = 64 * 2**20
"""Largest [n, F] intermediate where tokens are encoded in chunks."""
SITE_PATH = "site_path"
"""Entry of `SAEConfig.extra`: the module its activations come from; "" is where the architecture has the site."""
INPUT_NORM = "input_norm"
"""Entry of `SAEConfig.extra`: how each token is normalised before it is encoded, see `sae.formats.token_normalised`."""
CONTEXT_LENGTH, PREPEND_BOS, EXCLUDE_SPECIAL = "context_length", "prepend_bos", "exclude_special"
"""Entries of `SAEConfig.extra`: how text was read in training, the longest context in tokens and two yes or no."""
SAE_CONFIG_FILE = "config.json"
WEIGHTS_FILE = "sae.safetensors"


@dataclass(frozen=True)
class SAEConfig:
    """The architecture and size of an autoencoder, and the model and site it was made for."""

    architecture: str
    """Name of the architecture; decides how pre-activations become features."""
    d_model: int
    """Width d of the activations it writes, and reads unless `d_read` says otherwise."""
    n_features: int
    """Number of features F."""
    site: str = ""
    """Site of the model it was trained at, such as resid_3."""
    model: str = ""
    """Name or path of the model it was trained on."""
    model_fingerprint: str = ""
    """Fingerprint of that model's config and weights; empty when unknown."""
    subtract_b_dec: bool = True
    """Whether the decoder bias is subtracted from the input before encoding; never in a transcoder."""
    read: ReadKind | Literal[""] = ""
    """Place in its block at which a transcoder reads (see `sae.model.sites.READ_KINDS`); empty for its own site."""
    d_read: int | None = None
    """Width r of what a transcoder reads, where that is not d."""
    k: int | None = None
    """Active features a token, where the architecture fixes them."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything else worth keeping: training options, source of a converted file."""

    @property
    def input_norm(self) -> str:
        """How each token is normalised before it is encoded; "" where the encoder reads the activations themselves."""
        return str(self.extra.get(INPUT_NORM, ""))

    @property
    def read_width(self) -> int:
        """Width r of what it reads."""
        return self.d_read or self.d_model

    def read_site(self, site: Site) -> Site:
        """The site that the dictionary of a site reads: the same, or a place before it."""
        return Site(self.read, site.layer) if self.read else site

    @property
    def n_bytes(self) -> int:
        """Bytes its tensors take in memory: two float32 matrices, perhaps a third one, and up to four vectors."""
        skip = self.d_model * self.read_width if self.read else 0
        matrices = self.n_features * (self.d_model + self.read_width) + skip
        return 4 * (matrices + 3 * self.n_features + self.d_model)


class SparseFeatures(NamedTuple):
    """Nonzero features of N tokens, sorted by token and then by feature."""

    token: Tensor  # [n] int64
    feature: Tensor  # [n] int64
    value: Tensor  # [n]


class SparseAutoencoder(nn.Module):
    """A trained autoencoder or transcoder: frozen float32 tensors and three maps between them."""

    W_enc: Tensor  # [F, r]; r = d unless it is a transcoder
    b_enc: Tensor  # [F]
    W_dec: Tensor  # [F, d], unit rows
    b_dec: Tensor  # [d]

    def __init__(self, config: SAEConfig, tensors: Mapping[str, Tensor]):
        super().__init__()
        self.config = config
        self.nonlinearity = nonlinearity(config.architecture)
        self._check(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach().to(torch.float32).contiguous())
        self._reads_neurons = self.nonlinearity is IDENTITY and _is_eye(self.W_enc)

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        config, kind = self.config, self.nonlinearity
        n_features, d, r = config.n_features, config.d_model, config.read_width
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys((*kind.extra, *kind.optional), (n_features,))
        shapes |= {"W_enc": (n_features, r), "W_dec": (n_features, d), "b_enc": (n_features,), "b_dec": (d,)}
        shapes |= {SKIP: (d, r)} if config.read else {}
        self._check_read()
        missing = [name for name in (*CORE, *kind.extra) if name not in tensors]
        surplus = [name for name in tensors if name not in shapes]
        if missing or surplus:
            raise UserError(
                f"a {config.architecture!r} autoencoder has tensors {', '.join((*CORE, *kind.extra))}; "
                f"missing {missing}, not known {surplus}"
            )
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != shapes[name]:
                shape, expected = tuple(tensor.shape), shapes[name]
                raise UserError(f"tensor {name} of site {config.site!r} has shape {shape}, expected {expected}")
        if kind.needs_k and not (config.k is not None and 1 <= config.k <= n_features):
            raise UserError(f"k of site {config.site!r} is {config.k}, allowed are 1 to {n_features}, its features")

    def _check_read(self) -> None:
        """Only what an MLP adds to the residual stream is written by transcoders."""
        config = self.config
        if config.read and config.read not in READ_KINDS:
            raise unknown("place to read", config.read, READ_KINDS)
        if config.read and config.subtract_b_dec:
            raise UserError("subtract_b_dec of a transcoder is true: it reads something else than it writes")
        elsewhere = bool(config.site) and Site.parse(config.site).kind != "mlp"
        if (config.read and elsewhere) or (config.d_read and not config.read):
            raise UserError(
                f"the dictionary of site {config.site!r} reads at {config.read or 'that site'!r} with width "
                f"{config.read_width}: allowed is another place for transcoders of mlp sites alone"
            )

    def extra_repr(self) -> str:
        config = self.config
        read = f", reads {config.read}" if config.read else ""
        sizes = f"d={config.d_model}, F={config.n_features}, k={config.k}"
        return f"{config.architecture}, site={config.site!r}{read}, {sizes}"

    @property
    def device(self) -> torch.device:
        """Device of its tensors."""
        return self.W_dec.device

    @property
    def has_skip(self) -> bool:
        """Whether it has a skip connection."""
        return SKIP in self._buffers

    def _linear(self, x: Tensor) -> Tensor:
        """x [..., r] -> z without bias [..., F]."""
        x = x.to(self.W_enc.dtype)
        if self._reads_neurons and not self.config.subtract_b_dec:
            return x
        return (x - self.b_dec if self.config.subtract_b_dec else x) @ self.W_enc.T

    def encode(self, x: Tensor) -> Tensor:
        """x [..., r] -> f [..., F]."""
        return self.nonlinearity.apply(self._linear(x), self._buffers_by_name, self.config.k)

    def restrict(self, index: Tensor) -> SparseAutoencoder:
        """The autoencoder of the features `index` [n] alone, without a skip connection; `UserError` where features
        compete (top k).
        """
        if self.nonlinearity.needs_k:
            raise UserError(f"features of a {self.config.architecture!r} autoencoder compete: none can be taken alone")
        index = index.to(self.device)
        tensors = {
            name: x if name == "b_dec" else x[index] for name, x in self._buffers_by_name.items() if name != SKIP
        }
        return SparseAutoencoder(replace(self.config, n_features=len(index)), tensors).to(self.W_dec.dtype)

    def encode_some(self, x: Tensor, index: Tensor) -> Tensor:
        """Encode some features: x [..., r] -> f [..., n].

        Only their encoder rows are used; where features compete all of them are encoded, chunk of tokens by chunk.

        Args:
            x: [..., r] what the dictionary reads.
            index: [n] int64 numbers of the features.

        Returns:
            f [..., n], in the dictionary's number type.
        """
        if not len(index):
            return x.new_zeros(*x.shape[:-1], 0)
        if not self.nonlinearity.needs_k:
            return self.restrict(index).encode(x)
        index = index.to(self.device)
        chunks = x.reshape(-1, x.shape[-1]).split(max(1, CHUNK_BYTES // (4 * self.config.n_features)))
        return torch.cat([self.encode(chunk)[:, index] for chunk in chunks]).reshape(*x.shape[:-1], len(index))

    def encode_and_reconstruct(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Encode some features and reconstruct from all of them, chunk of tokens by chunk: no [..., F] is built.

        Args:
            x: [..., r] what the dictionary reads.
            index: [n] int64 numbers of the features.

        Returns:
            f [..., n] of the features, and x̂ [..., d].
        """
        index = index.to(self.device)
        rows = max(1, CHUNK_BYTES // (4 * self.config.n_features))
        some, x_hat = [x.new_zeros(0, len(index))], [x.new_zeros(0, self.config.d_model)]
        for chunk in x.reshape(-1, x.shape[-1]).split(rows):
            f = self.encode(chunk)
            some.append(f[:, index])
            x_hat.append(self.with_skip(self.decode(f), chunk))
        return torch.cat(some).reshape(*x.shape[:-1], len(index)), torch.cat(x_hat).reshape(*x.shape[:-1], -1)

    def decode(self, f: Tensor) -> Tensor:
        """f [..., F] -> x̂ [..., d], without the skip connection."""
        return f @ self.W_dec + self.b_dec

    def skip(self, x: Tensor) -> Tensor:
        """x [..., r] -> W_skip x [..., d], the part of x̂ that the skip connection makes."""
        W_skip = self._buffers_by_name[SKIP]
        return x.to(W_skip.dtype) @ W_skip.T

    def skip_gradient(self, g: Tensor) -> Tensor:
        """∂(g · W_skip x)/∂x [..., r] for g [..., d]."""
        return g @ self._buffers_by_name[SKIP]

    def with_skip(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Add what a skip connection, if there is one, makes of x.

        Args:
            x_hat: [..., d] from the features and the bias.
            x: [..., r] what the dictionary reads.

        Returns:
            x̂ [..., d].
        """
        return x_hat + self.skip(x) if self.has_skip else x_hat

    def forward(self, x: Tensor) -> Tensor:
        """x [..., r] -> x̂ [..., d]."""
        return self.with_skip(self.decode(self.encode(x)), x)

    @property
    def _buffers_by_name(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    @torch.no_grad()
    def encode_sparse(self, x: Tensor, *, chunk_bytes: int = CHUNK_BYTES) -> SparseFeatures:
        """Encode into nonzero features alone, in chunks of tokens.

        Args:
            x: [N, r] what the dictionary reads.
            chunk_bytes: The most that the [n, F] intermediate of a chunk may take.

        Returns:
            The nonzero entries, sorted by token.
        """
        rows = max(1, chunk_bytes // (4 * self.config.n_features))
        chunks = [self._encode_chunk(chunk, i * rows) for i, chunk in enumerate(x.split(rows))]
        return SparseFeatures(*(torch.cat(column) for column in zip(*chunks, strict=True)))

    def _encode_chunk(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        if self.nonlinearity.name == TOPK.name:
            assert self.config.k is not None
            z = self._linear(x).add_(self.b_enc)
            value, feature = top_features(z, self.config.k, self._buffers.get("rank_scale"))  # [n, k]
            feature, order = feature.sort(dim=-1)
            value = value.gather(-1, order)
            token, rank = value.nonzero(as_tuple=True)
            return token + start, feature[token, rank], value[token, rank]
        f = self.encode(x)
        token, feature = f.nonzero(as_tuple=True)
        return token + start, feature, f[token, feature]

    def encoder_rows(self, index: Tensor) -> Tensor:
        """∂f_i/∂x [n, r] for features i in `index` [n], where they are active."""
        rows = self.W_enc[index]
        if "magnitude" in self._buffers:
            rows = rows * self._buffers_by_name["magnitude"][index, None]
        return rows

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write `config.json` and `sae.safetensors` into the folder, each under a temporary name first.

        Args:
            folder: The folder.
            overwrite: Whether files of these names are replaced that are no autoencoder of this format.

        Returns:
            The folder.

        Raises:
            UserError: For such files, unless `overwrite`.
        """
        folder = Path(folder)
        for name in (SAE_CONFIG_FILE, WEIGHTS_FILE):
            check_output(folder / name, is_own, overwrite=overwrite)
        write_tensors(folder / WEIGHTS_FILE, self._buffers_by_name)
        write_json(folder / SAE_CONFIG_FILE, {"schema_version": SCHEMA_VERSION, **asdict(self.config)})
        return folder

    @classmethod
    def load(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> SparseAutoencoder:
        """Reads what `save` wrote; `UserError`, naming the file, for what is damaged or was written wrongly."""
        config, path = read_config(folder), Path(folder) / WEIGHTS_FILE
        if config.input_norm:
            raise UserError(
                f"{folder} was converted from an autoencoder that normalises each token ({config.input_norm}), and "
                f"this format does not hold that: convert {config.extra.get('source', 'its own file')!r} to saelens"
            )
        kind = nonlinearity(config.architecture)
        sizes = {"F": config.n_features, "d": config.d_model, "r": config.read_width}
        tensors = read_tensors(path, tensor_specs(kind), **sizes)
        return cls(config, tensors).to(device)


def is_own(path: Path) -> bool:
    """Whether a file is of an autoencoder in this format, which its config says."""
    return like({"schema_version", *(f.name for f in fields(SAEConfig))})(path.with_name(SAE_CONFIG_FILE))


def read_config(folder: str | Path) -> SAEConfig:
    """The config of the autoencoder in a folder, without its weights."""
    folder = Path(folder)
    if not is_sae_folder(folder):
        looked_for = f"looked for {SAE_CONFIG_FILE} and {WEIGHTS_FILE}"
        raise UserError(f"no autoencoder in {str(folder)!r}: {looked_for}, found {names_in(folder)}")
    entries = read_json(folder / SAE_CONFIG_FILE)
    version = entries.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise UserError(f"{folder / SAE_CONFIG_FILE} has schema_version {version!r}, allowed is {SCHEMA_VERSION}")
    allowed = {f.name for f in fields(SAEConfig)}
    if surplus := sorted(set(entries) - allowed):
        raise UserError(f"{folder / SAE_CONFIG_FILE} has unknown entries {surplus}, allowed are {sorted(allowed)}")
    return check_type(entries, SAEConfig, folder / SAE_CONFIG_FILE)


def tensor_specs(kind: ActivationFunction) -> dict[str, TensorSpec]:
    """The tensors of a dictionary with F features that reads width r and writes width d."""
    vector = TensorSpec(("F",))
    specs = {"W_enc": TensorSpec(("F", "r")), "b_enc": vector, "W_dec": TensorSpec(("F", "d"))}
    specs |= {"b_dec": TensorSpec(("d",)), SKIP: TensorSpec(("d", "r"), optional=True)}
    return specs | dict.fromkeys(kind.extra, vector) | dict.fromkeys(kind.optional, replace(vector, optional=True))


def is_sae_folder(folder: str | Path) -> bool:
    """Whether a folder holds an autoencoder written by `SparseAutoencoder.save`."""
    folder = Path(folder)
    return (folder / SAE_CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file()


def _is_eye(matrix: Tensor) -> bool:
    """Whether a matrix is the identity."""
    square = matrix.shape[0] == matrix.shape[1] and bool((matrix.diagonal() == 1).all())
    return square and int(matrix.count_nonzero()) == len(matrix)
