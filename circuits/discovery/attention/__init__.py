"""Why attention looks where it does: features behind a score, and heads behind an edge."""
