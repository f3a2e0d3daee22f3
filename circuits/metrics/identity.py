"""Which metric is this? Names and fingerprints of metrics, so that what one function gave is never taken for another's.

1. Metrics of the package have names (`kl`) and probes have files: they can be read from a run at any time.
2. Any other metric is code: a Python function, `file.py:function` or `module:function`. A run only says which it was;
   whoever opens it gives the code again (`circuits.metrics.metrics.circuit_metric`). None runs because a file says so.
3. Its fingerprint is a hash of the syntax tree of its source (comments and layout do not count; of the bytecode where
   there is no source), of the values it closes over, its defaults, and what it uses of its module: functions and
   constants. None where something of it cannot be compared.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor

MAX_DEPTH = 8
PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device)


def names_code(name: str) -> bool:
    """Whether a metric's name is that of Python code, `file.py:function` or `module:function`."""
    return ":" in name and not name.startswith(("probe:", "probe-margin:"))


def code_name(metric: Callable[..., Any]) -> str:
    """`module:function` of a metric given as a Python object; `module:class` of another object that can be called."""
    if isinstance(metric, functools.partial):
        return code_name(metric.func)
    target = metric if hasattr(metric, "__qualname__") else type(metric)
    return f"{getattr(target, '__module__', None) or 'unknown'}:{target.__qualname__}"


def code_fingerprint(*values: Any) -> str | None:
    """A short hash of what functions compute, and of plain values and tensors; None where one cannot be compared
    (a builtin, an object with state that is no plain value).
    """
    try:
        text = "; ".join(_described(value, None, 0) for value in values)
    except _Unknown:
        return None
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Unknown(Exception):
    """Something that has no comparable description."""


def _described(value: Any, module: str | None, depth: int) -> str:
    """A text that is equal for equal values; functions outside `module` are described by name alone."""
    if depth > MAX_DEPTH:
        raise _Unknown
    inner = functools.partial(_described, module=module, depth=depth + 1)
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"tensor {value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"
    if isinstance(value, list | tuple | set | frozenset):
        items = [inner(item) for item in value]
        return f"{type(value).__name__}({', '.join(sorted(items) if isinstance(value, set | frozenset) else items)})"
    if isinstance(value, Mapping):
        return f"map({', '.join(sorted(f'{inner(key)}: {inner(item)}' for key, item in value.items()))})"
    if isinstance(value, ModuleType):
        return f"module {value.__name__}"
    if isinstance(value, functools.partial):
        return f"partial({inner(value.func)}, {inner(value.args)}, {inner(value.keywords)})"
    if isinstance(value, MethodType):
        return f"method({inner(value.__func__)}, {inner(value.__self__)})"
    if isinstance(value, FunctionType):
        return _function(value, module, depth)
    if inspect.isclass(value) or inspect.isbuiltin(value):
        return f"{value.__module__}.{value.__qualname__}"
    return _object(value, module, depth)


def _function(function: FunctionType, module: str | None, depth: int) -> str:
    """A function by its code and all that the code reads; by its name where it belongs to another module."""
    if module is not None and function.__module__ != module:
        return f"function {function.__module__}.{function.__qualname__}"
    inner = functools.partial(_described, module=function.__module__, depth=depth + 1)
    closed = [_cell(cell, inner) for cell in function.__closure__ or ()]
    code = function.__code__
    read = {name: function.__globals__[name] for name in sorted(_names(code)) if name in function.__globals__}
    used = [f"{name}={inner(value)}" for name, value in read.items() if value is not function]
    defaults = inner(function.__defaults__), inner(function.__kwdefaults__)
    return f"def {_source(function)} closed {closed} used {used} defaults {defaults}"


def _cell(cell: Any, describe: Callable[[Any], str]) -> str:
    try:
        return describe(cell.cell_contents)
    except ValueError:  # not filled yet
        return "empty"


def _source(function: FunctionType) -> str:
    """The function's syntax tree as text without its docstring, or its bytecode where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):  # typed in a shell, or a lambda in the middle of an expression
        return _bytecode(function.__code__)
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):  # a lambda: its line holds more
        return _bytecode(function.__code__)
    node = tree.body[0]
    if node.body and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant):
        node.body = node.body[1:]
    return ast.dump(node)


def _bytecode(code: CodeType) -> str:
    constants = [_bytecode(item) if isinstance(item, CodeType) else repr(item) for item in code.co_consts]
    return f"{code.co_code.hex()} {constants} {code.co_names}"


def _names(code: CodeType) -> set[str]:
    """Global names that the code, or a function inside it, reads."""
    inside = (_names(item) for item in code.co_consts if isinstance(item, CodeType))
    return set(code.co_names).union(*inside)


def _object(value: Any, module: str | None, depth: int) -> str:
    """An object that can be called: its class's code and its plain state."""
    call = vars(type(value)).get("__call__")
    if is_dataclass(value):
        state = {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(call, FunctionType) and hasattr(value, "__dict__"):
        state = dict(vars(value))
    else:
        raise _Unknown
    inner = functools.partial(_described, module=type(value).__module__, depth=depth + 1)
    called = inner(call) if isinstance(call, FunctionType) else ""
    return f"{type(value).__module__}.{type(value).__qualname__} {called} {inner(state)}"
