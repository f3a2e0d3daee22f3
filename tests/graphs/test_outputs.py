"""What the package writes replaces its own files of that kind, and no others unless it is told to."""

from __future__ import annotations

import pytest

from graphs import draw, explore, write_annotations, write_eap_ig, write_graphml, write_neuronpedia
from graphs.errors import GraphError

SHAPE = {"n_layers": 4, "n_heads": 2, "d_model": 4}
WRITERS = {
    "a.svg": draw,
    "a.png": draw,
    "a.pdf": draw,
    "a.dot": draw,
    "a.html": explore,
    "a.graphml": write_graphml,
    "neuronpedia.json": write_neuronpedia,
    "eap_ig.json": lambda graph, path, **options: write_eap_ig(graph, path, **SHAPE, **options),
    "graph.json": lambda graph, path, **options: graph.save(path, **options),
    "labels.jsonl": lambda graph, path, **options: write_annotations({"resid_1/3": "nouns"}, path, **options),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_somebody_else_stays(name, make_circuit, tmp_path):
    graph, write, path = make_circuit(n_nodes=8, n_edges=4), WRITERS[name], tmp_path / name
    path.write_text('{"title": "mine"}')
    with pytest.raises(GraphError, match="not written by this program"):
        write(graph, path)
    assert path.read_text() == '{"title": "mine"}'
    write(graph, path, overwrite=True)
    write(graph, path)
    link, folder = tmp_path / f"link{path.suffix}", tmp_path / f"folder{path.suffix}"
    link.symlink_to(path)
    folder.mkdir()
    for target, match in ((link, "is a link"), (folder, "is a folder")):
        with pytest.raises(GraphError, match=match):
            write(graph, target, overwrite=True)
