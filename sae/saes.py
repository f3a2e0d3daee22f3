"""Autoencoders that together do not fit in memory: read when their site is asked for, and let go of afterwards.

1. The folder is searched; configs say how large the autoencoders are. Formats of other projects are read once for it.
2. What fits in the budget as a whole is loaded at once, as a plain dictionary.
3. Else a `SAEs` takes its place: asked for a site, it reads that autoencoder (safetensors are memory-mapped)
   and moves it to the device. Room for two is set aside, the one in use and the next; the rest of the budget keeps
   those read first. Work goes over the sites in the same order again and again: throwing out the least recently used
   would then read every one of them every time.

All autoencoders of Gemma 2 2B (26 layers, three sites, width 2,304, 16,384 features) are 24 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sae._run.contents import check_complete
from sae.autoencoder import SAEConfig, SparseAutoencoder, find_saes, read_config, sae_folders
from sae.errors import UserError
from sae.formats import load_any, read_folder, site_of
from sae.formats.locate import folders_in
from sae.model.sites import Site

GIB = 2**30
SHARE_OF_FREE = 0.5
"""Part of the free memory that autoencoders may take where nothing else was said."""


@dataclass(frozen=True)
class Source:
    """Where an autoencoder is read from."""

    read: Callable[[], SparseAutoencoder]
    """Reads it to the CPU."""
    config: SAEConfig
    """What it is."""


class SAEs(Mapping[Site, SparseAutoencoder]):
    """Autoencoders by site of which at most `budget` bytes are in memory, those still in use by the caller included.

    A caller that keeps more than one of them keeps them in memory: ask again instead.
    """

    def __init__(self, sources: Mapping[Site, Source], *, device: str | torch.device, budget: int) -> None:
        self.device = torch.device(device)
        self.budget = budget
        self.n_reads = 0
        self._sources = dict(sorted(sources.items()))
        self._kept: dict[Site, SparseAutoencoder] = {}
        self._latest: tuple[Site, SparseAutoencoder] | None = None
        self._biases: dict[Site, Tensor] = {}
        self._room = budget - 2 * max(source.config.n_bytes for source in sources.values())
        if self._room < 0:
            least = 2 * max(source.config.n_bytes for source in sources.values()) / GIB
            raise UserError(
                f"sae-memory is {budget / GIB:.3g} GiB: it must hold two autoencoders, the one in use and the next, "
                f"which take {least:.3g} GiB here"
            )

    def __getitem__(self, site: Site) -> SparseAutoencoder:
        source = self._sources[site]
        if site in self._kept:
            return self._kept[site]
        if self._latest is not None and self._latest[0] == site:
            return self._latest[1]
        self._latest = None
        sae = source.read().to(self.device)
        self.n_reads += 1
        self._biases[site] = sae.b_dec.clone()
        if source.config.n_bytes <= self._room:
            self._room -= source.config.n_bytes
            self._kept[site] = sae
        else:
            self._latest = site, sae
        return sae

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def __contains__(self, site: object) -> bool:
        return site in self._sources

    @property
    def n_staying(self) -> int:
        """How many stay in memory once they were read, when work goes over the sites in order."""
        room, n = self.budget - 2 * max(source.config.n_bytes for source in self._sources.values()), 0
        for source in self._sources.values():
            fits = source.config.n_bytes <= room
            room, n = room - fits * source.config.n_bytes, n + fits
        return n

    def config(self, site: Site) -> SAEConfig:
        """What the autoencoder of a site is; nothing is read."""
        return self._sources[site].config

    def bias(self, site: Site) -> Tensor:
        """b_dec [d] of a site, which stays in memory once the site was read."""
        if site not in self._biases:
            self[site]
        return self._biases[site]

    def only(self, sites: Iterable[Site]) -> SAEs:
        """Those of some sites, with the same budget."""
        return SAEs({site: self._sources[site] for site in sites}, device=self.device, budget=self.budget)


def subset(saes: Mapping[Site, SparseAutoencoder], sites: Iterable[Site]) -> Mapping[Site, SparseAutoencoder]:
    """The autoencoders of some sites; streamed ones stay so."""
    if isinstance(saes, SAEs):
        return saes.only(sites)
    return {site: saes[site] for site in sites}


def config_of(saes: Mapping[Site, SparseAutoencoder], site: Site) -> SAEConfig:
    """What the autoencoder of a site is, without reading it."""
    return saes.config(site) if isinstance(saes, SAEs) else saes[site].config


def decoder_bias(saes: Mapping[Site, SparseAutoencoder], site: Site) -> Tensor:
    """b_dec [d] of a site, read from disk at most once."""
    return saes.bias(site) if isinstance(saes, SAEs) else saes[site].b_dec


def device_of(saes: Mapping[Site, SparseAutoencoder]) -> torch.device:
    """Where the tensors of some autoencoders are."""
    return saes.device if isinstance(saes, SAEs) else next(iter(saes.values())).device


def open_saes(
    path: str | Path,
    *,
    sites: Iterable[Site | str] | None = None,
    device: str | torch.device = "cpu",
    budget: int | None = None,
) -> Mapping[Site, SparseAutoencoder]:
    """The autoencoders below a folder, all in memory if they fit in `budget` bytes, else streamed.

    budget: half of what is free on the device by default. A single autoencoder, and any on the hub, is always loaded.
    """
    wanted = None if sites is None else [Site.parse(str(site)) for site in sites]
    device = torch.device(device)
    root = Path(path).expanduser()
    check_complete(root)
    if budget is None:
        free = free_memory(device)
        budget = None if free is None else int(SHARE_OF_FREE * free)
    if budget is None or _at_most(root) <= budget:
        return load_any(path, sites=wanted, device=device)
    sources = _sources(root, wanted)
    if sum(source.config.n_bytes for source in sources.values()) <= budget:
        return load_any(path, sites=wanted, device=device)
    return SAEs(sources, device=device, budget=budget)


def _at_most(root: Path) -> int:
    """Bytes that the autoencoders below a folder take in float32 at most, whatever they are stored in: twice those on
    disk.
    """
    if not root.is_dir():
        return 0
    folders = sae_folders(root) or [root / folder for folder in folders_in(root)]
    return 2 * sum(path.stat().st_size for folder in folders for path in folder.iterdir() if path.is_file())


def _sources(root: Path, sites: list[Site] | None) -> dict[Site, Source]:
    """What can be streamed below a folder; nothing where it is no folder of several autoencoders."""
    if not root.is_dir():
        return {}
    if sae_folders(root):
        return {
            site: Source(partial(SparseAutoencoder.load, folder), read_config(folder))
            for site, folder in find_saes(root, sites=sites).items()
        }
    found: dict[Site, Source] = {}
    folders = folders_in(root)
    for folder in folders if len(folders) > 1 else ():
        sae = read_folder(root / folder)
        site = site_of(sae, str(root / folder))
        if site in found:
            raise UserError(f"{str(root)!r} holds several autoencoders for site {site}: name the folder of one")
        if sites is None or site in sites:
            found[site] = Source(partial(read_folder, root / folder), sae.config)
    return found


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
