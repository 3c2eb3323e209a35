"""Operations whose stock interpretation is wrong or missing."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton._C.libtriton import interpreter as native
from triton._C.libtriton import ir

_Builder = interpreter.InterpreterBuilder


def bf16_to_float32(bits: np.ndarray) -> np.ndarray:
    """The values of bfloat16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Bit patterns, rounded to nearest even as GPUs do; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _values(handle: Any) -> np.ndarray:
    return bf16_to_float32(handle.data) if handle.dtype.scalar == tl.bfloat16 else handle.data


def _smallest_inner_dimension(bits: int) -> int:
    return 32 if bits == 8 else 16


def install() -> None:
    """Replace tl.dot, bfloat16 conversions and atomics, and the conversion of scalars to Python integers."""
    stock_dot, stock_rmw = _Builder.create_dot, _Builder.create_atomic_rmw
    stock_binary = _Builder.binary_op
    stock_cast, stock_fp_to_fp = _Builder.cast_impl, _Builder.create_fp_to_fp
    stock_patch_tensor = interpreter._patch_lang_tensor

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.data.shape[-1] < _smallest_inner_dimension(a.dtype.primitive_bitwidth):
            raise ValueError(f"tl.dot: the CUDA backend needs K >= 16, got {a.data.shape} @ {b.data.shape}")
        if tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar):
            return interpreter.TensorHandle(np.matmul(_values(a), _values(b)) + d.data, d.dtype.scalar)
        return stock_dot(self, a, b, d, *rest)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        """Cast with rounding: the stock one truncates float32 to bfloat16."""
        if dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(float32_to_bf16(_values(src)), tl.bfloat16)
        if src.dtype.scalar == tl.bfloat16:
            data = _values(src).astype(interpreter._get_np_dtype(dst_type))
            return interpreter.TensorHandle(data, dst_type.scalar)
        return stock_cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if dst_type.scalar == tl.bfloat16 and rounding_mode == ir.ROUNDING_MODE.RTNE:
            return cast_impl(self, src, dst_type)
        return stock_fp_to_fp(self, src, dst_type, rounding_mode)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        """Refuse what the stock one computes on the bit patterns."""
        if tl.bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar):
            raise NotImplementedError("interpreted bfloat16 arithmetic: convert to float32 first")
        return stock_binary(self, lhs, rhs, op)

    def create_atomic_rmw(self: Any, op: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
        if val.dtype.scalar != tl.bfloat16:
            return stock_rmw(self, op, ptr, val, mask, sem, scope)
        if op != ir.ATOMIC_OP.FADD:
            raise NotImplementedError(f"interpreted bfloat16 atomics: only addition, got {op}")
        return interpreter.TensorHandle(_bf16_atomic_add(ptr.data, _values(val), mask.data), val.dtype.scalar)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        stock_patch_tensor(tensor, scope)
        # Scalars are arrays of one element, which NumPy 2.4 no longer converts by itself.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def tree_sum(self: Any, input: Any) -> Any:
        """tl.sum as a tree, as GPUs add: NumPy's sum along a leading axis adds one by one, with larger errors."""
        data = input.handle.data
        axis = 0 if self.axis is None else self.axis
        data = np.moveaxis(data.reshape(-1) if self.axis is None else data, axis, 0)
        while len(data) > 1:  # sizes are powers of 2
            data = data[: len(data) // 2] + data[len(data) // 2 :]
        if self.axis is None:
            result = data.reshape((1,) * input.handle.data.ndim if self.keep_dims else ())
        else:
            result = np.moveaxis(data, 0, axis) if self.keep_dims else data[0]
        return self.to_tensor(result, input.dtype)

    interpreter.ReduceOps.sum = tree_sum
    _Builder.create_dot = create_dot
    _Builder.binary_op = binary_op
    _Builder.cast_impl = cast_impl
    _Builder.create_fp_to_fp = create_fp_to_fp
    _Builder.create_atomic_rmw = create_atomic_rmw
    interpreter._patch_lang_tensor = patch_tensor


def _bf16_atomic_add(addresses: np.ndarray, values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Add values one by one, so that equal addresses accumulate; returns the bit patterns before."""
    one = np.ones(1, dtype=bool)
    before = np.zeros(addresses.shape, np.uint16)
    for place in np.argwhere(np.broadcast_to(mask, addresses.shape).astype(bool)):
        index = tuple(place)
        address = np.array([addresses[index]], np.uint64)
        bits = native.load(address, one, np.zeros(1, np.uint16), np.dtype(np.uint16))
        before[index] = bits[0]
        native.store(address, float32_to_bf16(bf16_to_float32(bits) + values[index]), one)
    return before
