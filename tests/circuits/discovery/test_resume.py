"""An interrupted discovery goes on after its last finished batch and ends at the same bits."""

from __future__ import annotations

import pytest

from circuits._tensors import flatten
from circuits.discovery.batching import GIB, backward_bytes
from circuits.discovery.discover import discover
from circuits.discovery.resume import ResumeFolder, interrupted, remove_partial
from circuits.options import DiscoverOptions
from sae._files import digest_tensors
from sae.errors import UserError
from sae.saes import SAEs, Source


def small(model, prompts, **options) -> DiscoverOptions:
    """Options that put two prompts in a batch; at three sites."""
    memory = 2.5 * backward_bytes(model, prompts.clean.n_positions) / GIB
    return DiscoverOptions(
        **{"edge_nodes": 16, "memory": memory, "method": "attrib", "sites": "resid,mlp_1", **options}
    )


def streamed(saes) -> SAEs:
    """The same autoencoders, of which two are in memory at once."""
    sources = {site: Source(lambda sae=sae: sae, sae.config) for site, sae in saes.items()}
    return SAEs.lazy(sources, device="cpu", budget=2 * max(sae.config.n_bytes for sae in saes.values()))


def at_three_sites(saes) -> dict:
    return {site: sae for site, sae in saes.items() if site.kind == "resid" or site.name == "mlp_1"}


def same_bits(one, other) -> bool:
    """Whether two circuits agree to the bit, undefined numbers included."""
    return one.metadata == other.metadata and digest_tensors(flatten(one)) == digest_tensors(flatten(other))


class Stopped(Exception):
    """The machine went down."""


def stop_after(monkeypatch, n: int) -> list[str]:
    """Let n batches be finished, then fail; the names of those finished."""
    put, names = ResumeFolder.put, []

    def limited(self, name, tensors):
        if len(names) == n:
            raise Stopped
        names.append(name)
        put(self, name, tensors)

    monkeypatch.setattr(ResumeFolder, "put", limited)
    return names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "method", "finished"),
    [("jumprelu", "attrib", 1), ("topk", "ig", 6)],
)
def test_resuming_gives_the_same_bits(
    tiny_model, make_saes, tiny_prompts, tmp_path, monkeypatch, architecture, method, finished
):
    """Four batches a pass, stopped in the first and in the second; the same in memory alone and from files."""
    saes = make_saes(tiny_model, architecture=architecture)
    options = small(tiny_model, tiny_prompts, method=method, steps=2)
    whole = discover(tiny_model, saes, tiny_prompts, options, progress=False)
    names = stop_after(monkeypatch, finished)
    with pytest.raises(Stopped):
        discover(tiny_model, saes, tiny_prompts, options, progress=False, partial=tmp_path / "p")
    assert len(names) == finished and interrupted(tmp_path / "p")
    monkeypatch.undo()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "p").iterdir()}
    again = discover(tiny_model, saes, tiny_prompts, options, progress=False, partial=tmp_path / "p", resume=True)
    assert same_bits(whole, again)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    remove_partial(tmp_path / "p")
    assert not interrupted(tmp_path / "p")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["attrib", "graddrop", "random", "ig-adaptive"])
def test_streamed_autoencoders_give_the_same_bits(tiny_model, tiny_saes, tiny_prompts, method):
    """All gradients of a round come first, and each autoencoder is read once a round."""
    options = small(tiny_model, tiny_prompts, method=method, residual=0.05, edge_nodes=8)
    saes = streamed(tiny_saes)
    assert same_bits(
        discover(tiny_model, tiny_saes, tiny_prompts, options, progress=False),
        discover(tiny_model, saes, tiny_prompts, options, progress=False),
    )


def test_autoencoders_are_read_once_a_round(tiny_model, tiny_saes, tiny_prompts):
    saes = streamed(at_three_sites(tiny_saes))
    roomy = DiscoverOptions(method="attrib", edge_nodes=40)
    discover(tiny_model, saes, tiny_prompts, roomy, progress=False)
    assert 0 < saes.n_reads <= 2 * len(saes)  # one round: once for nodes, once for edges
    saes = streamed(at_three_sites(tiny_saes))
    discover(tiny_model, saes, tiny_prompts, small(tiny_model, tiny_prompts, sites="all"), progress=False)
    assert 0 < saes.n_reads <= 2 * 4 * len(saes)


@pytest.mark.parametrize(("change", "hint"), [({"steps": 3}, "steps 10, not 3"), ({"method": "relp"}, "'attrib'")])
def test_other_work_is_refused(tiny_model, tiny_saes, tiny_prompts, tmp_path, monkeypatch, change, hint):
    stop_after(monkeypatch, 1)
    with pytest.raises(Stopped):
        discover(tiny_model, tiny_saes, tiny_prompts, small(tiny_model, tiny_prompts), partial=tmp_path, progress=False)
    monkeypatch.undo()
    other = small(tiny_model, tiny_prompts, **change)
    with pytest.raises(UserError, match=hint):
        discover(tiny_model, tiny_saes, tiny_prompts, other, partial=tmp_path, resume=True, progress=False)
    with pytest.raises(UserError, match="had prompts"):
        discover(
            tiny_model, tiny_saes, tiny_prompts[:6], small(tiny_model, tiny_prompts), partial=tmp_path, resume=True,
            progress=False,
        )  # fmt: skip
    fewer = {site: sae for site, sae in tiny_saes.items() if site.name != "resid_0"}
    with pytest.raises(UserError, match="had autoencoders"):
        discover(
            tiny_model, fewer, tiny_prompts, small(tiny_model, tiny_prompts), partial=tmp_path, resume=True,
            progress=False,
        )  # fmt: skip


def test_without_resume_the_files_of_before_go(tiny_model, tiny_saes, tiny_prompts, tmp_path, monkeypatch):
    stop_after(monkeypatch, 3)
    with pytest.raises(Stopped):
        discover(tiny_model, tiny_saes, tiny_prompts, small(tiny_model, tiny_prompts), partial=tmp_path, progress=False)
    monkeypatch.undo()
    options = DiscoverOptions(method="attrib", edge_nodes=0)
    discover(tiny_model, tiny_saes, tiny_prompts, options, partial=tmp_path, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nodes-0000.safetensors", "partial.json"]
