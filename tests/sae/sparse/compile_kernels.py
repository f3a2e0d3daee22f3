"""Compiles every kernel for compute capability 9.0, which needs no GPU, and prints their names as it goes.

`test_kernels` runs it by itself, since kernels cannot be compiled in a process in which Triton interprets.
"""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sae.sparse import triton_kernels as kernels

D = 2304
SHAPE, BLOCK = kernels.Shape.of(D), triton.next_power_of_2(D)
INTEGERS = {"index": "*i64", "offsets": "*i64", "owners": "*i64", "smallest": "fp32"}
"""Types of arguments that are not float32 tensors, sizes or strides."""
SIZES = ("n_parts", "d", "source_stride", "rows_stride", "gradient_stride")


def compile_kernel(kernel, warps, **constants):
    """The kernel's code for rows of `D` float32 numbers."""
    types = {name: INTEGERS.get(name, "i32" if name in SIZES else "*fp32") for name in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, types, {(kernel.arg_names.index(name),): value for name, value in constants.items()})
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert ".target sm_90" in code.asm["ptx"]
    assert len(code.asm["cubin"]) > 0


if __name__ == "__main__":
    tiles = {"HEIGHT": SHAPE.height, "LEFT": SHAPE.left, "RIGHT": SHAPE.right, "WINDOW": kernels.WINDOW}
    warps = kernels.warps_of(BLOCK)
    for kernel, constants in (
        (kernels._bag_sum, {"DOTS": False, **tiles}),
        (kernels._bag_sum, {"DOTS": True, **tiles}),
        (kernels._add_parts, {"WINDOW": kernels.WINDOW, "BLOCK": BLOCK}),
        (kernels._project, {"BLOCK": BLOCK}),
        (kernels._normalise, {"BLOCK": BLOCK}),
    ):
        compile_kernel(kernel, SHAPE.warps if kernel is kernels._bag_sum else warps, **constants)
        print(kernel.__name__)  # noqa: T201
