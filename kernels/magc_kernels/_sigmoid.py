"""The logistic function of the convolution's and the norms' kernels. Requires the package `triton`."""

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def sigmoid(x):
    """`1 / (1 + exp(-x))` of float32, to a few units in the last place.

    Far below zero the exponential is infinite and the result 0. Triton's own exponential and division take twice
    the instructions, for operands that this one never sees or whose exponential counts for nothing beside 1; these
    kernels, bound by memory, have few to spare.
    """
    if INTERPRETED:
        return 1.0 / (1.0 + tl.exp(-x))
    else:
        return tl.inline_asm_elementwise(
            # The first constant is -log2(e), the second 1.
            """
            mul.f32 $0, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 $0, $0;
            add.f32 $0, $0, 0f3F800000;
            rcp.approx.ftz.f32 $0, $0;
            """,
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
