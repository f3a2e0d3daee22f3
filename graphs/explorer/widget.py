"""The explorer in a notebook: an anywidget whose `selected`, `labels` and `groups` are in step with the page."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from graphs.errors import GraphError

if TYPE_CHECKING:
    import anywidget


def make_widget(
    page: str, module: str, *, height: int = 640, names: Callable[[list[str]], list[str]] = list
) -> anywidget.AnyWidget:
    """A widget that shows a page of the explorer.

    Args:
        page: The page, which holds everything it needs.
        module: The ES module that puts it into the notebook.
        height: In CSS pixels.
        names: What becomes of the ids of nodes that are clicked, before Python sees them.

    Returns:
        An anywidget with the traits

        selected: ids of the nodes that are pinned, the last first; setting it pins them;
        labels: name of a feature -> the label a person gave it there;
        groups: supernodes, each a dict of name, nodes and collapsed.

    Raises:
        GraphError: Where anywidget is not installed.
    """
    try:
        import anywidget
        import traitlets
    except ImportError:
        raise GraphError(
            "a widget needs anywidget: pip install 'sparse-feature-circuits[notebook]'; explore(FILE.html) needs none"
        ) from None

    class Explorer(anywidget.AnyWidget):
        """A circuit to explore in a notebook."""

        _esm = module
        page = traitlets.Unicode().tag(sync=True)
        height = traitlets.Int().tag(sync=True)
        selected = traitlets.List(traitlets.Unicode()).tag(sync=True)
        labels = traitlets.Dict(value_trait=traitlets.Unicode(), key_trait=traitlets.Unicode()).tag(sync=True)
        groups = traitlets.List(traitlets.Dict()).tag(sync=True)

        @traitlets.validate("selected")
        def _named(self, proposal: Any) -> list[str]:
            return names(proposal["value"])

    return Explorer(page=page, height=height)
