"""The autoencoders of a model by site, in memory or, where together they do not fit, read when a site is asked for.

1. The path is searched; configs say how large the autoencoders are. Formats of other projects are read once for it.
2. What fits in the budget as a whole is loaded at once.
3. Else `SAEs` is lazy: asked for a site, it reads that autoencoder (safetensors are memory-mapped) and moves it to the
   device. Room for two is set aside, the one in use and the next; in the rest of the budget those of the first sites
   stay. Work goes over the sites in the same order again and again: throwing out the least recently used would then
   read every one of them every time.

All autoencoders of Gemma 2 2B (26 layers, three sites, width 2,304, 16,384 features) are 24 GB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sae._run.contents import check_complete
from sae._run.processes import current
from sae.autoencoder import WEIGHTS_FILE, ReadKind, SAEConfig, SparseAutoencoder, is_sae_folder, read_config
from sae.errors import UserError
from sae.formats import read_folder, site_of
from sae.formats.locate import Located, located
from sae.formats.sets import split_source
from sae.model.huggingface import resolve_device
from sae.model.sites import Site

GIB = 2**30
SHARE_OF_FREE = 0.5
"""Part of the free memory that autoencoders may take where nothing else was said."""
SAMPLED_VALUES = 64  # of each tensor, for the fingerprint


@dataclass(frozen=True)
class Source:
    """An autoencoder on disk."""

    read: Callable[[], SparseAutoencoder]
    """Reads it to the CPU."""
    config: SAEConfig
    """Its config, which is in memory."""


class SAEs(Mapping[Site, SparseAutoencoder]):
    """Autoencoders by site, in the order of the forward pass: `SAEs({site: sae})` of those in memory, or lazy.

    Of lazy ones (`SAEs.lazy`) at most `budget` bytes are in memory, those still in use by the caller included. A caller
    that keeps more than one of them keeps them in memory: ask again instead.
    """

    def __init__(self, saes: Mapping[Site, SparseAutoencoder]) -> None:
        self.budget: int | None = None
        self.n_reads = 0
        self._in_memory = dict(sorted(saes.items()))
        self._sites = tuple(self._in_memory)
        self._sources: dict[Site, Source] = {}  # of lazy ones, and what follows
        self._staying: set[Site] = set()
        self._latest: tuple[Site, SparseAutoencoder] | None = None
        self._biases: dict[Site, Tensor] = {}
        self._device = torch.device("cpu")

    @classmethod
    def lazy(cls, sources: Mapping[Site, Source], *, device: str | torch.device, budget: int) -> SAEs:
        """Autoencoders that are read when they are asked for, of which at most `budget` bytes are in memory."""
        saes = cls({})
        saes.budget, saes._sources, saes._device = budget, dict(sorted(sources.items())), torch.device(device)
        saes._sites = tuple(saes._sources)
        least = 2 * max(source.config.n_bytes for source in sources.values())
        if least > budget:
            raise UserError(
                f"sae-memory is {budget / GIB:.3g} GiB: it must hold two autoencoders, the one in use and the next, "
                f"which take {least / GIB:.3g} GiB here"
            )
        room = budget - least
        for site, source in saes._sources.items():
            if source.config.n_bytes <= room:
                saes._staying.add(site)
                room -= source.config.n_bytes
        return saes

    @property
    def is_lazy(self) -> bool:
        """Whether autoencoders are read from disk when their site is asked for."""
        return self.budget is not None

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self._device if self.is_lazy else next(iter(self._in_memory.values())).device

    def __getitem__(self, site: Site) -> SparseAutoencoder:
        if site in self._in_memory or not self.is_lazy:
            return self._in_memory[site]
        source = self._sources[site]
        if self._latest is not None and self._latest[0] == site:
            return self._latest[1]
        self._latest = None
        sae = source.read().to(self._device)
        self.n_reads += 1
        self._biases[site] = sae.b_dec.clone()
        if site in self._staying:
            self._in_memory[site] = sae
        else:
            self._latest = site, sae
        return sae

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __contains__(self, site: object) -> bool:
        return site in self._sites

    def __repr__(self) -> str:
        lines = (
            f"  {site}: {self.config(site).architecture}, {self.config(site).n_features:,} features" for site in self
        )
        return "\n".join([f"SAEs at {len(self)} sites{', read when needed' if self.is_lazy else ''}", *lines])

    @property
    def n_bytes(self) -> int:
        """Bytes of memory that the autoencoders take at most: all of them, or the budget."""
        total = sum(self.config(site).n_bytes for site in self)
        return total if self.budget is None else min(total, self.budget)

    @property
    def n_staying(self) -> int:
        """Number that stay in memory once they were read."""
        return len(self._staying) if self.is_lazy else len(self)

    def config(self, site: Site) -> SAEConfig:
        """The config of a site's autoencoder; nothing is read."""
        return self._sources[site].config if self.is_lazy else self._in_memory[site].config

    def read_sites(self, sites: Iterable[Site]) -> dict[Site, Site]:
        """The site that the dictionary of each site reads: the site itself, or for a transcoder a place before it."""
        return {site: self.config(site).read_site(site) for site in sites}

    def bias(self, site: Site) -> Tensor:
        """b_dec [d] of a site, which stays in memory once the site was read."""
        if not self.is_lazy:
            return self._in_memory[site].b_dec
        if site not in self._biases:
            self[site]
        return self._biases[site]

    def subset(self, sites: Iterable[Site]) -> SAEs:
        """Select some sites; lazy autoencoders keep their budget."""
        if self.budget is None:
            return SAEs({site: self._in_memory[site] for site in sites})
        return SAEs.lazy({site: self._sources[site] for site in sites}, device=self._device, budget=self.budget)


def as_saes(saes: Mapping[Site, SparseAutoencoder]) -> SAEs:
    """Autoencoders by site as `SAEs`: what public functions make of a dictionary that they are given."""
    return saes if isinstance(saes, SAEs) else SAEs(saes)


def load_saes(
    source: str | Path,
    *,
    sites: Iterable[Site | str] | None = None,
    device: str | torch.device = "auto",
    budget: float | None = None,
    read: ReadKind | None = None,
) -> SAEs:
    """Load all autoencoders of a run, or of a folder in any known format, by site.

    Args:
        source: a run folder, its `saes` folder, a folder of autoencoders in another project's format (see
            `sae.formats`), one autoencoder, `owner/repository/folder` on the hub, or a name of `sfc saes`; with
            `?width=16k&l0=small` behind it one of several a site (`sae.formats.sets`), and several between commas.
        sites: the sites to load; all that are there by default.
        device: where their tensors go: a device, or "auto" for cuda, mps or cpu, whichever is there first.
        budget: bytes of memory for them, half of what is free on the device by default. Those that together do not fit
            are read whenever their site is asked for; a single one is always loaded.
        read: the place at which the transcoders among them read (`sae.model.sites.READ_KINDS`), whatever their files
            say.

    Returns:
        The autoencoders by site, in the order of the forward pass.

    Raises:
        UserError: nothing is there, a site is missing or is there twice, a file is damaged, or an earlier command that
            writes the folder did not finish.
    """
    resolved = resolve_device(device)
    for part, _ in split_source(str(source)):
        check_complete(Path(part).expanduser())
    if budget is None:
        free = free_memory(resolved)
        budget = float("inf") if free is None else int(SHARE_OF_FREE * free)
    wanted = None if sites is None else {Site.parse(str(site)) for site in sites}
    dictionaries = located(source, None if wanted is None else sorted(site.name for site in wanted))
    fits = _bytes_at_most(dictionaries) <= budget
    sources = _sources(source, dictionaries, wanted, keep=fits)
    if read is not None:
        sources = {site: _reading_at(of_site, read) for site, of_site in sources.items()}
    if fits or len(sources) == 1 or sum(of_site.config.n_bytes for of_site in sources.values()) <= budget:
        return SAEs({site: of_site.read().to(resolved) for site, of_site in sources.items()})
    return SAEs.lazy(sources, device=resolved, budget=int(budget))


def _bytes_at_most(dictionaries: Iterable[Located]) -> int:
    """Bytes that dictionaries take in float32 at most, whatever they are stored in: twice those on disk."""
    paths = [path for each in dictionaries for path in (each.path.iterdir() if each.path.is_dir() else [each.path])]
    return 2 * sum(path.stat().st_size for path in paths if path.is_file())


def _sources(
    source: str | Path, dictionaries: Sequence[Located], sites: set[Site] | None, *, keep: bool
) -> dict[Site, Source]:
    """The dictionary of each site; with `keep` those that had to be read for their site stay in memory."""
    only = next(iter(sites)).name if sites is not None and len(sites) == 1 and len(dictionaries) == 1 else ""
    sources: dict[Site, Source] = {}
    for each in dictionaries:
        if is_sae_folder(each.path):
            of_path = Source(partial(SparseAutoencoder.load, each.path), read_config(each.path))
        else:
            of_path = _read_source(each.path, each.site or only, keep=keep)
        if each.read is not None:
            of_path = _reading_at(of_path, each.read)
        site = site_of(of_path.config, str(each.path))
        if site in sources:
            raise UserError(f"{str(source)!r} holds several autoencoders for site {site}: name the folder of one")
        sources[site] = of_path
    wanted = set(sources) if sites is None else sites
    if missing := sorted(wanted - set(sources)):
        names, has = (", ".join(map(str, listed)) for listed in (missing, sorted(sources)))
        raise UserError(f"{str(source)!r} has no autoencoder for {names}; it has {has}")
    return {site: sources[site] for site in wanted}


def _read_source(path: Path, site: str, *, keep: bool) -> Source:
    """A dictionary of another project, read once for what it is."""
    sae = read_folder(path, site)
    return Source(partial(_itself, sae) if keep else partial(read_folder, path, site), sae.config)


def _reading_at(source: Source, read: ReadKind) -> Source:
    """A transcoder that reads at another place than its files say; an autoencoder as it is."""
    if not source.config.read:
        return source
    config = replace(source.config, read=read)

    def moved() -> SparseAutoencoder:
        sae = source.read()
        sae.config = config
        return sae

    return Source(moved, config)


def _itself(sae: SparseAutoencoder) -> SparseAutoencoder:
    return sae


def saes_fingerprint(saes: Mapping[Site, SparseAutoencoder]) -> str:
    """A short hash of a sample of all tensors of some autoencoders: a circuit means nothing with others."""
    digest = hashlib.sha256()
    for site in sorted(saes):
        digest.update(_sample(site, saes[site].config, saes[site].named_buffers()))
    return digest.hexdigest()[:16]


def stored_fingerprint(folder: str | Path) -> str:
    """The fingerprint of the one autoencoder in a folder of our own, of which no more is read than is sampled."""
    config = read_config(folder)
    with safe_open(Path(folder) / WEIGHTS_FILE, framework="pt") as file:
        sample = _sample(Site.parse(config.site), config, [(name, file.get_tensor(name)) for name in file.keys()])  # noqa: SIM118
    return hashlib.sha256(sample).hexdigest()[:16]


def _sample(site: Site, config: SAEConfig, tensors: Iterable[tuple[str, Tensor]]) -> bytes:
    """Site, kind and some values of every tensor."""
    pieces = [f"{site} {config.architecture} {config.k}{f' {config.read}' if config.read else ''}".encode()]
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        sample = tensor.flatten()[:: max(1, tensor.numel() // SAMPLED_VALUES)].float().cpu()
        pieces.append(f"{name} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    return b"".join(pieces)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on a device; None where nobody says."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    available = _available()
    return None if available is None else available // current().n_local  # processes share what a machine has


def _available() -> int | None:
    """Main memory that can be had without swapping (Linux), within the limit of the container if there is one."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    limits = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        most, used = (int(path.read_text()) for path in limits)
    except (OSError, ValueError):  # no such files, or "max"
        return free
    return min(free, max(0, most - used))
