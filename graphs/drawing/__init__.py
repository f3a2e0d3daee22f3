"""A graph as Graphviz draws it: layout, style, DOT, SVG, PNG, PDF."""
