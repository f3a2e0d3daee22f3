"""Models whose modules lie on several devices, or whose weights wait in main memory or on disk.

1. accelerate, through transformers' `device_map`, spreads a model over what a machine has. Its hooks move activations
   to the device of each module, and bring weights that wait elsewhere (they are on torch's device `meta` meanwhile) for
   as long as the module runs.
2. One device is the model's home, that of its embedding: token ids go there, and there are the activations that are
   read and written (`sae.model.hook_points`), whichever device their layer is on.
3. Weights that are read without running their module are asked for by `weight_of`.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sae._run.processes import current
from sae.errors import UserError, unknown

PLANS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways of accelerate to spread a model by the memory of the devices."""
QUANTISED = ("Params4bit", "Int8Params")
"""Classes of bitsandbytes for weights in 4 and 8 bits."""
DeviceMap = str | Mapping[str, str]
"""A plan, one device for all, or where each module goes."""


def parse_device_map(device_map: DeviceMap) -> str | dict[str, str]:
    """A device map as transformers takes it, from "auto", "disk" or "model.embed_tokens=cuda:0,model.layers=cpu,...".

    Raises:
        UserError: it says nothing of this kind, there are several processes, or accelerate is not installed.
    """
    if current().size > 1:
        raise UserError("device-map is for one process: each of several has a device of its own, and the whole model")
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("device-map needs the package accelerate: pip install 'sparse-feature-circuits[accelerate]'")
    if isinstance(device_map, str) and device_map in PLANS:
        return device_map
    if isinstance(device_map, str):
        pairs = [part.rpartition("=") for part in device_map.split(",")]
        modules = {module.strip(): device.strip() for module, _, device in pairs}
    else:
        modules = dict(device_map)
    return {module: _device(device) for module, device in modules.items()}


def _device(name: str) -> str:
    """A device of a map, which must be there."""
    device = None
    with suppress(RuntimeError):
        device = torch.device("cpu" if name == "disk" else name)
    allowed = [*PLANS, "cpu", "disk", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if device is None or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise unknown("device-map", name, allowed)
    return name


@contextmanager
def offload_folder() -> Iterator[tuple[Path, list[nn.Module]]]:
    """Yields a temporary folder for weights, and a list for the model that they are of: it stays as long as that does.

    transformers leaves safetensors in place; what it must convert goes here. accelerate does not say meanwhile that
    weights wait elsewhere.
    """
    models: list[nn.Module] = []
    folder, words = Path(tempfile.mkdtemp(prefix="sfc-offload-")), logging.getLogger("accelerate")
    level = words.level
    words.setLevel(logging.ERROR)
    try:
        yield folder, models
    finally:
        words.setLevel(level)
        if models and any(folder.iterdir()):
            weakref.finalize(models[0], shutil.rmtree, folder, ignore_errors=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def check_modules(hf: nn.Module, device_map: str | Mapping[str, Any]) -> None:
    """`UserError` where a map names a module that the model does not have, or leaves out one that it has."""
    if isinstance(device_map, str):
        return
    modules = [name for name, _ in hf.named_modules()]
    for name in device_map:
        if name not in modules:
            raise unknown("module of device-map", name, modules[1:])
    for name, _ in hf.named_parameters():
        if not any(module in ("", name) or name.startswith(f"{module}.") for module in device_map):
            raise UserError(f"device-map says nothing of {name}: give a device for it, as MODULE=DEVICE")


def is_spread(hf: nn.Module) -> bool:
    """Whether accelerate's hooks look after the devices of a model."""
    return any(hasattr(module, "_hf_hook") for module in hf.modules())


def is_offloaded(hf: nn.Module) -> bool:
    """Whether weights of a model wait in main memory or on disk."""
    return any(parameter.device.type == "meta" for parameter in hf.parameters())


def home_device(hf: nn.Module) -> torch.device:
    """The device of the first parameter of a model, or of a part of it; where it waits elsewhere, that of its use."""
    first = next(hf.parameters())
    if first.device.type != "meta":
        return first.device
    module = next(m for m in hf.modules() if any(p is first for p in m.parameters(recurse=False)))
    hook = _offloading_hook(module)
    return first.device if hook is None else torch.device(hook.execution_device)


def weight_of(module: nn.Module, name: str = "weight") -> Tensor | None:
    """A parameter of a module, on the device it is used on, wherever it waits, and as numbers where bitsandbytes holds
    it; None where there is none.
    """
    parameter = getattr(module, name, None)
    if type(parameter).__name__ in QUANTISED:
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        return dequantize_bnb_weight(parameter, getattr(module, "state", None))
    hook = _offloading_hook(module)
    if parameter is None or parameter.device.type != "meta" or hook is None:
        return parameter
    return hook.weights_map[name].to(hook.execution_device)


@contextmanager
def fetched(module: nn.Module) -> Iterator[None]:
    """The parameters of a module are where they are used while the context lasts, wherever they wait."""
    hook = _offloading_hook(module)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def bytes_at_home(hf: nn.Module) -> int:
    """Bytes of the parameters that stay on a model's home device."""
    home = home_device(hf)
    return sum(weight.numel() * weight.element_size() for weight in hf.parameters() if weight.device == home)


def weights_of(hf: nn.Module) -> Iterator[Tensor]:
    """Every parameter of a model once, as `hf.parameters()` lists them, wherever it waits."""
    seen: set[int] = set()
    for module in hf.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                weight = weight_of(module, name)
                assert weight is not None
                yield weight


def _offloading_hook(module: nn.Module) -> Any:
    """accelerate's hook that fetches the weights of a module; None where they stay with it."""
    hook = getattr(module, "_hf_hook", None)
    return next((one for one in getattr(hook, "hooks", [hook]) if getattr(one, "offload", False)), None)
