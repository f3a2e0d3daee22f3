"""Node and edge effects: one file a method, one interface over all of them (`node_effects`, `edges`)."""
