"""A second device without one: real values in host memory under the name of CUDA or MPS.

1. A tensor "on the device" is a wrapper around a CPU tensor. Every operation on it arrives in `__torch_dispatch__`, is
   computed on the tensors inside, and its results are wrapped again.
2. What a real device refuses is refused: operations that mix it with CPU tensors (0-dimensional ones, and
   indices into it, are allowed), CPU generators for tensors of the device, `.numpy()`. Under the name "mps" float64 is
   refused too, and operations that MPS does not have.
3. To torch's own machinery (autograd, modules) the device is its backend for extensions, PrivateUse1. A function mode
   translates the name, so that the code under test sees `cuda` or `mps` wherever it looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

BACKEND = "simulated"
COPIES = {"copy_", "_to_copy", "_foreach_copy_"}
"""Operations between devices."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""Operations that move CPU indices to the device of what is indexed, not the other way round."""
AUTOCAST = {torch.nn.functional.linear, torch.mm, torch.matmul, torch.addmm, torch.Tensor.__matmul__, torch.Tensor.mm}
"""Functions that autocast runs in bfloat16."""
MISSING_ON_MPS = {
    "_embedding_bag", "_embedding_bag_forward_only", "_embedding_bag_per_sample_weights_backward", "segment_reduce",
    "bincount", "unique_dim", "kthvalue", "linalg_eigh", "linalg_lstsq", "histc", "frexp", "mode",
}  # fmt: skip
"""What MPS has not in every release of torch that is supported (embedding bags come with 2.10, without the last offset
until 2.13), or has in a form that takes seconds or aborts (bincount, histc)."""

FREE = 2**33
"""Bytes of memory that the device says it has."""
_MACHINE: dict[str, dict[str, Callable[..., Any]]] = {
    "cuda": {
        "cuda.is_available": lambda: True, "cuda._lazy_init": lambda: None, "cuda.is_bf16_supported": lambda: True,
        "cuda.current_device": lambda: 0,
        "cuda.synchronize": lambda *_: None, "cuda.mem_get_info": lambda *_: (FREE, FREE),
        "cuda.memory_reserved": lambda *_: 0, "cuda.memory_allocated": lambda *_: 0,
        "cuda.reset_peak_memory_stats": lambda *_: None, "cuda.max_memory_allocated": lambda *_: 0,
    },
    "mps": {
        "backends.mps.is_available": lambda: True, "mps.synchronize": lambda: None,
        "mps.recommended_max_memory": lambda: FREE, "mps.current_allocated_memory": lambda: 0,
    },
}  # fmt: skip
_name: str | None = None  # what the device is called while there is one


def tree_map(function: Callable[[Any], Any], x: Any) -> Any:
    """x with the function's values in place of its leaves; torch's own does the same for more types, at ten times the
    cost, and every operation needs it."""
    kind = type(x)
    if kind is tuple or kind is list:
        return kind([tree_map(function, part) for part in x])
    if kind is dict:
        return {key: tree_map(function, part) for key, part in x.items()}
    return function(x)


def tensors_in(x: Any, into: list[torch.Tensor]) -> list[torch.Tensor]:
    """The list with the tensors of x added."""
    if isinstance(x, torch.Tensor):
        into.append(x)
    elif isinstance(x, tuple | list):
        for part in x:
            tensors_in(part, into)
    elif type(x) is dict:
        for part in x.values():
            tensors_in(part, into)
    return into


class DeviceTensor(torch.Tensor):
    """A tensor of the simulated device; `inside` is its value."""

    inside: torch.Tensor

    @staticmethod
    def __new__(cls, inside: torch.Tensor) -> DeviceTensor:
        if _name == "mps" and inside.dtype in (torch.float64, torch.complex128):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, inside.shape, strides=inside.stride(), storage_offset=inside.storage_offset(), dtype=inside.dtype,
            device=torch.device(BACKEND, 0),
        )  # fmt: skip
        wrapper.inside = inside
        return wrapper

    @property
    def device(self) -> torch.device:
        return torch.device(_name or BACKEND, 0)

    is_cpu, is_cuda, is_mps = False, property(lambda self: _name == "cuda"), property(lambda self: _name == "mps")

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.inside!r})"

    def tolist(self) -> Any:
        return self.inside.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceTensor:
        copy = DeviceTensor(self.inside.clone()).requires_grad_(self.requires_grad)
        return memo.setdefault(id(self), copy)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation on the tensors inside; results are on the device if an argument was, or if it was asked for."""
    leaves = tensors_in(kwargs, tensors_in(args, []))
    wrappers = {id(x.inside): x for x in leaves if isinstance(x, DeviceTensor)}
    device = kwargs.get("device")
    if not wrappers and device is None:  # of the CPU alone
        with torch._C.DisableTorchFunction():
            return func(*args, **kwargs)
    operation = func.overloadpacket.__name__
    on_device = bool(wrappers)
    if device is not None:
        on_device = torch.device(device).type == BACKEND
        kwargs = kwargs | {"device": torch.device("cpu")}
    if on_device and (generator := kwargs.get("generator")) is not None:
        raise RuntimeError(f"Expected a {_name!r} device type for generator but found {str(generator.device)!r}")
    strangers = [x for x in leaves if not isinstance(x, DeviceTensor) and x.ndim]
    may_mix = operation in COPIES or (operation in INDEXING and isinstance(args[0], DeviceTensor))
    if wrappers and strangers and not may_mix:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {_name} and cpu")
    if on_device and _name == "mps" and operation in MISSING_ON_MPS:
        raise NotImplementedError(f"The operator '{func}' is not currently implemented for the MPS device")
    before = {key: wrapper.inside.shape for key, wrapper in wrappers.items()}
    inside = lambda x: x.inside if isinstance(x, DeviceTensor) else x  # noqa: E731
    with torch._C.DisableTorchFunction():
        result = func(*tree_map(inside, args), **(tree_map(inside, kwargs) if kwargs else kwargs))
    if torch.Tag.inplace_view in func.tags and isinstance(args[0], DeviceTensor):
        with no_dispatch():
            func(*args, **kwargs)  # the wrapper's own shape and strides
    else:
        assert all(before[key] == wrapper.inside.shape for key, wrapper in wrappers.items()), str(func)
    mine = {id(x): x for x in leaves}

    def wrapped(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in mine:
            return mine[id(x)]
        if id(x) in wrappers:
            return wrappers[id(x)]
        return DeviceTensor(x) if on_device else x

    return tree_map(wrapped, result)


class _Dispatch(TorchDispatchMode):
    """Sees operations without a tensor of the device, such as factories."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing is compiled here, and to forbid it costs each operation more than to compute it."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Names(TorchFunctionMode):
    """Calls the device what torch's own machinery knows it by."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in AUTOCAST and "out" not in kwargs and torch.is_autocast_enabled(_name):
            args = tree_map(
                lambda x: x.bfloat16() if isinstance(x, DeviceTensor) and x.dtype == torch.float32 else x, args
            )
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], _index(args[1]), *args[2:])
        if func is torch.device:
            return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and "device" in kwargs:  # these make their result in C++ alone
            rest = {key: value for key, value in kwargs.items() if key != "device"}
            return func(*args, **rest).to(_translated(kwargs["device"]))
        if not kwargs and all(isinstance(x, torch.Tensor) for x in args):  # most calls, such as for a shape
            return func(*args)
        return func(*tree_map(_translated, args), **tree_map(_translated, kwargs))


def _index(index: Any) -> Any:
    """An index with tensors in place of lists, which C++ alone would put on the device."""
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    return torch.tensor(index) if isinstance(index, list) else index


def _backward(*args: Any, **kwargs: Any) -> Any:
    """Autograd's engine with the names in force: a mode is suspended within a call that it handles."""
    with _Names():
        return _engine_run_backward(*args, **kwargs)


def _translated(x: Any) -> Any:
    if isinstance(x, torch.device) and x.type == _name:
        return torch.device(BACKEND, 0)
    return BACKEND if isinstance(x, str) and x.partition(":")[0] == _name else x


@contextmanager
def simulated_device(name: str) -> Iterator[torch.device]:
    """Makes `name`, cuda or mps, a device for the duration."""
    global _name
    if not hasattr(torch, BACKEND):
        backend_registration._setup_privateuseone_for_python_backend(BACKEND)
    with ExitStack() as stack:
        stack.enter_context(mock.patch(f"{__name__}._name", name))
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        torch.__future__.set_swap_module_params_on_conversion(True)
        for target, value in _MACHINE[name].items():
            stack.enter_context(mock.patch(f"torch.{target}", value))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # modes are those of this thread
        stack.enter_context(mock.patch("torch.autograd._engine_run_backward", _backward))
        stack.enter_context(_Dispatch())
        stack.enter_context(_Names())
        yield torch.device(name, 0)


def bring(module: torch.nn.Module, device: torch.device | str) -> None:
    """Move a module of a model to a device, and from now on what it is called with, as accelerate's hooks do."""
    module.to(device)

    def moved(x: Any) -> Any:
        return x.to(device) if isinstance(x, torch.Tensor) else x

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        return tree_map(moved, args), tree_map(moved, kwargs)

    module.register_forward_pre_hook(before, with_kwargs=True)
