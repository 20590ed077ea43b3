"""Makes Triton's interpreter compute what a GPU computes; import it before any kernel.

Under TRITON_INTERPRET=1 Triton runs a kernel program by program on CPU tensors. Four things are
wrong with it in Triton 3.6 and 3.7, and mended here:

- bfloat16 is kept as raw 16-bit patterns, and arithmetic on them is integer arithmetic. Here every
  operation widens its operands to float32 and rounds its result to nearest even, as the hardware.
- A float that a kernel is called with stays one of Python's, of 64 bits. Here it is a float32
  scalar, as on a GPU, where what is computed of it may overflow.
- With NumPy 2.5 or later `int()` of an array with one element raises, and so does every
  `range` whose bound is a kernel argument.
- `triton.autotune` with more than one configuration asks for a GPU to time them on; here it takes
  the first.

NumPy's warnings of overflow are off: a GPU gives infinity or NaN without a word, too.
"""

import os
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import autotuner
from triton.runtime import interpreter as triton_interpreter

Builder = triton_interpreter.InterpreterBuilder
Handle = triton_interpreter.TensorHandle

BFLOAT16_NAN = np.uint16(0x7FC0)


def widen(bits: Any) -> np.ndarray:
    """float32 of bfloat16 bits; exact."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: Any) -> np.ndarray:
    """bfloat16 bits of floats, rounded to nearest even."""
    floats = np.asarray(values).astype(np.float32)
    bits = np.atleast_1d(floats).view(np.uint32).reshape(floats.shape)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(floats), BFLOAT16_NAN, rounded)


def is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def widened(handle: Any) -> Any:
    return Handle(widen(handle.data), tl.float32) if is_bfloat16(handle) else handle


def narrowed(handle: Any) -> Any:
    """Of an operation's result; comparisons stay boolean."""
    if handle.data.dtype == np.bool_:
        return handle
    return Handle(narrow(handle.data), tl.bfloat16)


def _mend_arithmetic() -> None:
    binary, ternary, unary = Builder.binary_op, Builder.ternary_op, Builder.unary_op
    fma, dot = Builder.create_fma, Builder.create_dot
    bitwise = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)

    def binary_op(self: Any, a: Any, b: Any, op: Any) -> Any:
        if not is_bfloat16(a) or op in bitwise:
            return binary(self, a, b, op)
        return narrowed(binary(self, widened(a), widened(b), op))

    def ternary_op(self: Any, a: Any, b: Any, c: Any, op: Any) -> Any:
        if not is_bfloat16(c) or op is np.where:  # a selection needs no arithmetic
            return ternary(self, a, b, c, op)
        return narrowed(ternary(self, widened(a), widened(b), widened(c), op))

    def unary_op(self: Any, a: Any, op: Any) -> Any:
        return narrowed(unary(self, widened(a), op)) if is_bfloat16(a) else unary(self, a, op)

    def create_fma(self: Any, a: Any, b: Any, c: Any) -> Any:
        if not is_bfloat16(c):
            return fma(self, a, b, c)
        return narrowed(fma(self, widened(a), widened(b), widened(c)))

    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, *rest: Any) -> Any:
        result = dot(self, widened(a), widened(b), widened(accumulator), *rest)
        return narrowed(result) if is_bfloat16(accumulator) else result

    for replacement in (binary_op, ternary_op, unary_op, create_fma, create_dot):
        setattr(Builder, replacement.__name__, replacement)


def _mend_conversions() -> None:
    cast, float_to_float = Builder.cast_impl, Builder.create_fp_to_fp

    def cast_impl(self: Any, handle: Any, target: Any) -> Any:
        to_bfloat16 = target.scalar == tl.bfloat16
        if is_bfloat16(handle):
            if to_bfloat16:
                return handle
            wide = widened(handle)
            return wide if target.scalar == tl.float32 else cast(self, wide, target)
        return (
            Handle(narrow(handle.data), tl.bfloat16) if to_bfloat16 else cast(self, handle, target)
        )

    def create_fp_to_fp(self: Any, handle: Any, target: Any, rounding: Any) -> Any:
        if target.scalar == tl.bfloat16 and not is_bfloat16(handle):
            return Handle(narrow(handle.data), tl.bfloat16)
        return float_to_float(self, handle, target, rounding)

    def get_bf16(self: Any, value: float) -> Any:  # a literal beside a bfloat16 tensor
        return Handle(narrow([value]), tl.bfloat16)

    Builder.cast_impl, Builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    Builder.get_bf16 = get_bf16


def _mend_reductions() -> None:
    operations = triton_interpreter.ReduceOps
    add = operations.sum

    def total(self: Any, tensor: Any) -> Any:
        if tensor.dtype.scalar != tl.bfloat16:
            return add(self, tensor)
        summed = np.sum(widen(tensor.handle.data), axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(narrow(summed), tl.bfloat16)

    operations.sum = total


def _mend_float_arguments() -> None:
    convert = triton_interpreter._implicit_cvt

    def implicit_cvt(arg: Any) -> Any:
        if isinstance(arg, float):
            return tl.tensor(Handle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)
        return convert(arg)

    triton_interpreter._implicit_cvt = implicit_cvt


def _mend_loop_bounds() -> None:
    patch = triton_interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(
            tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])
        )

    triton_interpreter._patch_lang_tensor = patch_lang_tensor


def _mend_autotune() -> None:
    run = autotuner.Autotuner.run

    def first_configuration(self: Any, *args: Any, **kwargs: Any) -> Any:
        configurations = self.configs
        self.configs = configurations[:1]
        try:
            return run(self, *args, **kwargs)
        finally:
            self.configs = configurations

    autotuner.Autotuner.run = first_configuration


def install() -> None:
    """Mends the interpreter of this process, once."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET=1 must be set before triton is imported")
    if getattr(Builder, "_vlmfast_mended", False):
        return
    np.seterr(all="ignore")
    _mend_arithmetic()
    _mend_conversions()
    _mend_reductions()
    _mend_float_arguments()
    _mend_loop_bounds()
    _mend_autotune()
    Builder._vlmfast_mended = True
