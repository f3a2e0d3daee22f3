"""What the explorer costs: CPU of the page's main thread for the first drawing, and a frame while panning or hovering.

    python -m tests.benchmarks.bench_explorer [--graph circuit.json ...] [--sizes 300x3060 1000x10060 3000x10060]

Synthetic graphs of random edges through FeatureGraph, everything shown, in Chromium of 1400 x 900 without a GPU. The
figures are CPU milliseconds (`ThreadTime` of the DevTools protocol), which a busy machine changes little; frames are
counted as the page draws them. Aims: first drawing of the demo within 300 ms; a frame within 16 ms at 1,000 nodes and
33 ms at 3,000 nodes and 10,000 edges.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from graphs.explorer import explore
from graphs.feature_graph import FeatureGraph
from tests.graphs.browser import Browser, Page, find_chromium
from tests.graphs.conftest import build_circuit

FRAMES = 30
WIDTHS = (9, 10, 10, 8, 7, 7, 7, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graph", type=Path, nargs="*", default=[], help="graphs to measure as they first open")
    parser.add_argument("--sizes", nargs="*", default=["120x400", "300x3060", "1000x10060", "3000x10060"])
    options = parser.parse_args()
    if find_chromium() is None:
        raise SystemExit("no Chromium on the path")
    heads = ("page kB", "python s", "first ms", "all ms", "pan", "zoom", "hover", "search")
    print(f"{'graph':<22}" + "".join(f"{head:>{width}}" for head, width in zip(heads, WIDTHS, strict=True)))
    with tempfile.TemporaryDirectory() as folder:
        browser = Browser(Path(folder))
        try:
            for path in options.graph:
                measure(browser, FeatureGraph.load(path), path.name, Path(folder), everything=False)
            for size in options.sizes:
                n_nodes, n_edges = map(int, size.split("x"))
                n_layers = 24 if n_nodes > 300 else 6
                graph = build_circuit(n_nodes=n_nodes, n_edges=n_edges, n_layers=n_layers, positions=True)
                measure(browser, graph, size, Path(folder), everything=True)
        finally:
            browser.close()


def measure(browser: Browser, graph: FeatureGraph, name: str, folder: Path, *, everything: bool) -> None:
    """Print one line of the table."""
    start = time.process_time()
    path = explore(graph, folder / "page.html")
    python = time.process_time() - start
    page = browser.new_page()
    page.resize(1400, 900)
    page.goto(path.as_uri())
    first = page.cpu()
    before = page.cpu()
    if everything:
        page.goto(f"{path.as_uri()}#nodes={len(graph)}&edges={graph.graph.number_of_edges()}")
        page.evaluate("(viewer.state.readHash(location.hash), 0)")
        page.settle()
    whole = page.cpu() - before
    pan, zoom = frames(page, "pan"), frames(page, "zoom")
    page.evaluate("new Promise((done) => setTimeout(done, 400))")
    hover = frames(page, "hover")
    before = page.cpu()
    page.evaluate("viewer.state.query.value = 'girls'")
    page.settle()
    search = page.cpu() - before
    problems = page.problems()
    assert not problems, problems
    figures = [1000 * seconds for seconds in (first, whole)] + [pan, zoom, hover, 1000 * search]
    text = "".join(f"{value:>{width}.0f}" for value, width in zip(figures, WIDTHS[2:], strict=True))
    print(f"{name:<22}{path.stat().st_size / 1000:>9.0f}{python:>10.1f}{text}", flush=True)


def frames(page: Page, what: str) -> float:
    """CPU milliseconds of the main thread a frame while the mouse moves over the drawing."""
    page.settle()
    x, y = 500.0, 450.0
    page.move(x, y)
    if what == "pan":
        page.press(x, y, down=True)
    before = page.cpu()
    for step in range(FRAMES):
        if what == "pan":
            page.move(x + 6 * step, y + 3 * step, buttons=1)
        elif what == "hover":
            page.move(300 + 19 * step, 150 + 17 * step)
        else:
            page.send("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=20 if step % 2 else -20)
        page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
    spent = page.cpu() - before
    if what == "pan":
        page.press(x + 6 * FRAMES, y + 3 * FRAMES, down=False)
    page.settle()
    return 1000 * spent / FRAMES


if __name__ == "__main__":
    main()
