"""Experiments from a browser: `sfc serve` answers to one person on this machine (Starlette, uvicorn).

anyio, on which Starlette stands, refuses to be imported where its classes have attributes that are not declared, and
nnsight gives every object a method `save`: it is declared here.
"""

from anyio import TypedAttributeSet

TypedAttributeSet.__annotations__ = {**TypedAttributeSet.__annotations__, "save": object}
