"""Packages of the wheel: the three of the project, and the bundled example's data, which `sfc demo` reads.

In a clone the data stand in `examples/agreement`; an installed package has them in `circuits/bundled`, so that
`examples` is no name of its own there.
"""

from setuptools import find_packages, setup

BUNDLED = {f"circuits.bundled.{name}": f"examples/agreement/{name}" for name in ("model", "prompts", "text")}
setup(
    packages=[*find_packages(include=["circuits*", "sae*", "graphs*"]), *BUNDLED],
    package_dir=BUNDLED,
    package_data={
        "": ["*.j2", "*.css", "*.js", "*.licences.txt", "templates/*", "py.typed"],
        "sae.formats": ["releases.json"],
        "circuits.bundled.model": ["*"],
        "circuits.bundled.prompts": ["*/*.jsonl"],
        "circuits.bundled.text": ["*.txt"],
    },
)
