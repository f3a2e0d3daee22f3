"""The commands of `sfc` in the groups of `sfc --help`: dataclasses of options, each with its `run`."""
