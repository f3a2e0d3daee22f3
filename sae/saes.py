"""The autoencoders of a model by site, in memory or, where together they do not fit, read when a site is asked for.

1. The path is searched; configs say how large the autoencoders are. Formats of other projects are read once for it.
2. What fits in the budget as a whole is loaded at once.
3. Else `SAEs` is lazy: asked for a site, it reads that autoencoder (safetensors are memory-mapped) and moves it to the
   device. Room for two is set aside, the one in use and the next; the rest of the budget keeps those read first. Work
   goes over the sites in the same order again and again: throwing out the least recently used would then read every one
   of them every time.

All autoencoders of Gemma 2 2B (26 layers, three sites, width 2,304, 16,384 features) are 24 GB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sae._run.contents import check_complete
from sae.autoencoder import SAE_CONFIG_FILE, WEIGHTS_FILE, SAEConfig, SparseAutoencoder, read_config
from sae.errors import UserError
from sae.formats import load_sae, read_folder, site_of
from sae.formats.locate import folders_in, sae_folders
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
        self._sources: dict[Site, Source] = {}
        self._in_memory = dict(sorted(saes.items()))
        self._latest: tuple[Site, SparseAutoencoder] | None = None
        self._biases: dict[Site, Tensor] = {}
        self._device, self._room = torch.device("cpu"), 0

    @classmethod
    def lazy(cls, sources: Mapping[Site, Source], *, device: str | torch.device, budget: int) -> SAEs:
        """Autoencoders that are read when they are asked for, of which at most `budget` bytes are in memory."""
        saes = cls({})
        saes.budget, saes._sources, saes._device = budget, dict(sorted(sources.items())), torch.device(device)
        saes._room = budget - 2 * max(source.config.n_bytes for source in sources.values())
        if saes._room < 0:
            least = (budget - saes._room) / GIB
            raise UserError(
                f"sae-memory is {budget / GIB:.3g} GiB: it must hold two autoencoders, the one in use and the next, "
                f"which take {least:.3g} GiB here"
            )
        return saes

    @property
    def is_lazy(self) -> bool:
        """Whether autoencoders are read from disk when their site is asked for."""
        return self.budget is not None

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
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
        if source.config.n_bytes <= self._room:
            self._room -= source.config.n_bytes
            self._in_memory[site] = sae
        else:
            self._latest = site, sae
        return sae

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sources if self.is_lazy else self._in_memory)

    def __len__(self) -> int:
        return len(self._sources if self.is_lazy else self._in_memory)

    def __contains__(self, site: object) -> bool:
        return site in (self._sources if self.is_lazy else self._in_memory)

    def __repr__(self) -> str:
        lines = (f"  {site}: {config.architecture}, {config.n_features:,} features" for site, config in self._configs())
        return "\n".join([f"SAEs at {len(self)} sites{', read when needed' if self.is_lazy else ''}", *lines])

    def _configs(self) -> Iterator[tuple[Site, SAEConfig]]:
        return ((site, self.config(site)) for site in self)

    @property
    def n_bytes(self) -> int:
        """Bytes of memory that the autoencoders take at most: all of them, or the budget."""
        total = sum(config.n_bytes for _, config in self._configs())
        return total if self.budget is None else min(total, self.budget)

    @property
    def n_staying(self) -> int:
        """Number that stay in memory once they were read, when the sites are asked for in order."""
        if self.budget is None:
            return len(self)
        room, n = self.budget - 2 * max(source.config.n_bytes for source in self._sources.values()), 0
        for source in self._sources.values():
            fits = source.config.n_bytes <= room
            room, n = room - fits * source.config.n_bytes, n + fits
        return n

    def config(self, site: Site) -> SAEConfig:
        """The config of a site's autoencoder; nothing is read."""
        return self._sources[site].config if self.is_lazy else self._in_memory[site].config

    def bias(self, site: Site) -> Tensor:
        """b_dec [d] of a site, which stays in memory once the site was read."""
        if not self.is_lazy:
            return self._in_memory[site].b_dec
        if site not in self._biases:
            self[site]
        return self._biases[site]

    def subset(self, sites: Iterable[Site]) -> SAEs:
        """Those of some sites, with the same budget if they are lazy."""
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
) -> SAEs:
    """Load all autoencoders of a run, or of a folder in any known format, by site.

    Args:
        source: a run folder, its `saes` folder, a folder of autoencoders in another project's format (see
            `sae.formats`), one autoencoder, or `owner/repository/folder` on the hub.
        sites: the sites to load; all that are there by default.
        device: where their tensors go: a device, or "auto" for cuda, mps or cpu, whichever is there first.
        budget: bytes of memory for them, half of what is free on the device by default. Those that together do not fit
            are read whenever their site is asked for; a single one is always loaded.

    Returns:
        The autoencoders by site, in the order of the forward pass.

    Raises:
        UserError: nothing is there, a site is missing or is there twice, a file is damaged, or an earlier command that
            writes the folder did not finish.
    """
    root, resolved = Path(source).expanduser(), resolve_device(device)
    check_complete(root)
    if budget is None:
        free = free_memory(resolved)
        budget = float("inf") if free is None else int(SHARE_OF_FREE * free)
    fits = _bytes_at_most(root) <= budget
    sources = _sources(source, None if sites is None else {Site.parse(str(site)) for site in sites}, keep=fits)
    if fits or len(sources) == 1 or sum(of_site.config.n_bytes for of_site in sources.values()) <= budget:
        return SAEs({site: of_site.read().to(resolved) for site, of_site in sources.items()})
    return SAEs.lazy(sources, device=resolved, budget=int(budget))


def _bytes_at_most(root: Path) -> int:
    """Bytes that the autoencoders below a folder take in float32 at most, whatever they are stored in: twice those on
    disk.
    """
    if not root.is_dir():
        return 0
    folders = sae_folders(root) or [root / folder for folder in folders_in(root)]
    return 2 * sum(path.stat().st_size for folder in folders for path in folder.iterdir() if path.is_file())


def _sources(source: str | Path, sites: set[Site] | None, *, keep: bool) -> dict[Site, Source]:
    """Where the autoencoder of each site is read from; `keep` those that had to be read to know their site."""
    root = Path(source).expanduser()
    if root.is_dir() and sae_folders(root):
        folders = find_saes(root, sites=sites)
        return {
            site: Source(partial(SparseAutoencoder.load, folder), read_config(folder))
            for site, folder in folders.items()
        }
    names = folders_in(root) if root.is_dir() else []
    only = next(iter(sites)) if sites is not None and len(sites) == 1 else None
    if not names:
        sae = load_sae(source, site=only, device="cpu")
        return {site_of(sae, str(source)): _source_of(sae)}
    sources: dict[Site, Source] = {}
    given = only.name if only is not None and len(names) == 1 else ""
    for name in names:
        sae = read_folder(root / name, given)
        site = site_of(sae, str(root / name))
        if site in sources:
            raise UserError(f"{str(source)!r} holds several autoencoders for site {site}: name the folder of one")
        if sites is None or site in sites:
            sources[site] = _source_of(sae) if keep else Source(partial(read_folder, root / name, given), sae.config)
    if sites is not None and (missing := sorted(sites - set(sources))):
        raise UserError(f"{str(source)!r} has no autoencoder for {', '.join(map(str, missing))}")
    return sources


def _source_of(sae: SparseAutoencoder) -> Source:
    """One that was read already."""
    return Source(lambda: sae, sae.config)


def find_saes(path: str | Path, *, sites: Iterable[Site | str] | None = None) -> dict[Site, Path]:
    """The folder of each site's autoencoder in our own format, in forward order, where `load_saes` reads it."""
    folders = sae_folders(path)
    if not folders:
        raise UserError(
            f"no autoencoders in {str(path)!r}: looked for SITE/{SAE_CONFIG_FILE} and SITE/{WEIGHTS_FILE}, "
            "there and in a saes folder inside"
        )
    by_site: dict[Site, Path] = {}
    for folder in folders:
        site = Site.parse(read_config(folder).site)
        if site in by_site:
            raise UserError(f"{str(path)!r} holds several autoencoders for site {site}; name one of their folders")
        by_site[site] = folder
    wanted = set(by_site) if sites is None else {Site.parse(str(site)) for site in sites}
    if missing := sorted(wanted - set(by_site)):
        names, has = ", ".join(map(str, missing)), ", ".join(folder.name for folder in folders)
        raise UserError(f"{str(path)!r} has no autoencoder for {names}; it has {has}")
    return {site: by_site[site] for site in sorted(wanted)}


def saes_fingerprint(saes: Mapping[Site, SparseAutoencoder]) -> str:
    """A short hash of a sample of all tensors of some autoencoders: a circuit means nothing with others."""
    digest = hashlib.sha256()
    for site in sorted(saes):
        sae = saes[site]
        digest.update(f"{site} {sae.config.architecture} {sae.config.k}".encode())
        for name, tensor in sorted(sae.named_buffers()):
            sample = tensor.flatten()[:: max(1, tensor.numel() // SAMPLED_VALUES)].float().cpu()
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on a device; None where nobody says."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return _available()


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
