"""Triton's kernels on the null device: compiled, loaded and launched as on CUDA, and also computed by Triton's interpreter."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import on_host  # pyright: ignore[reportMissingModuleSource]  # compiled
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter, jit
from triton.runtime.autotuner import Autotuner

Handle = interpreter.TensorHandle

_lock = threading.RLock()  # the interpreter replaces functions of triton.language while it runs
_in_kernel = threading.local()
_interpreted: dict[int, interpreter.InterpretedFunction] = {}
_failed: set[str] = set()


def install() -> None:
    _keep_arguments_in_place()
    _round_bf16()
    compiled_launch = jit.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        result = compiled_launch(self, *args, grid=grid, warmup=warmup, **kwargs)
        if not warmup:
            by_name = dict(zip(self.arg_names, args, strict=False)) | kwargs
            sizes: Sequence[int] = grid(by_name) if callable(grid) else grid  # pyright: ignore[reportAssignmentType]
            size = tuple(map(int, sizes))
            parameters = {name: value for name, value in kwargs.items() if name in self.arg_names}  # no launch options
            _compute(self, size, args, parameters)
            if on_host.capturing():
                on_host.record(lambda: _compute(self, size, args, parameters))
        return result

    def call(self: jit.JITFunction, *args: Any, **kwargs: Any) -> Any:
        if not getattr(_in_kernel, "yes", False):
            raise RuntimeError("Cannot call @triton.jit'd outside of the scope of a kernel")
        arguments = {name: value for name, value in kwargs.items() if name not in ("_semantic", "_generator")}
        patched = interpreter._patch_lang(self.fn)
        try:
            return _interpreter_of(self).rewrite()(*args, **arguments)
        finally:
            patched.restore()

    _replace(jit.JITFunction, run=run, __call__=call)
    # All configurations would be computed many times over: the first is as good as any.
    _replace(Autotuner, _bench=lambda self, *args, config, **meta: [1.0, 1.0, 1.0])


def _replace(of: type, **methods: Callable[..., Any]) -> None:
    for name, method in methods.items():
        assert hasattr(of, name), f"this Triton has no {of.__name__}.{name}"
        setattr(of, name, method)


def _interpreter_of(kernel: jit.JITFunction) -> interpreter.InterpretedFunction:
    if id(kernel) not in _interpreted:
        _interpreted[id(kernel)] = interpreter.InterpretedFunction(kernel.fn)
    return _interpreted[id(kernel)]


def _compute(kernel: jit.JITFunction, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with _lock:
        interpret_before = knobs.runtime.interpret
        knobs.runtime.interpret = True
        _in_kernel.yes = True
        try:
            _interpreter_of(kernel).run(*args, grid=grid, warmup=False, **kwargs)
        except interpreter.InterpreterError as error:
            name = kernel.fn.__name__
            if name not in _failed:
                print(f"[nullcuda] {name} is launched but not computed: {error}", file=sys.stderr, flush=True)
            _failed.add(name)
        finally:
            _in_kernel.yes = False
            knobs.runtime.interpret = interpret_before


def _keep_arguments_in_place() -> None:
    """Device memory is host memory: nothing is copied there and back."""

    def to_host(value: Any) -> Any:
        if isinstance(value, tuple):
            return interpreter._tuple_create(value, map(to_host, value))
        if not hasattr(value, "data_ptr"):
            return value
        tensor = interpreter._unwrap_tensor(value)
        return interpreter._rewrap_tensor(on_host.as_cpu(tensor.detach()), original_tensor=value)

    def arguments_of(self: Any, args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
        return [to_host(value) for value in args], {name: to_host(value) for name, value in kwargs.items()}

    _replace(interpreter.GridExecutor, _init_args_hst=arguments_of, _restore_args_dev=lambda *_: None)


# --- bf16 --------------------------------------------------------------------------------------------------------------------
# Triton 3.7's interpreter keeps bf16 as uint16: it multiplies and adds these as integers, and truncates where chips round.


def _to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(data: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: Any) -> Any:
    return Handle(_to_fp32(handle.data), tl.float32) if _is_bf16(handle) else handle


def _of_result(data: np.ndarray, otherwise: Any) -> Any:
    """What an operation on bf16 gives: bf16 again, or the truth values of a comparison."""
    return Handle(_to_bf16(data), tl.bfloat16) if data.dtype == np.float32 else Handle(data, otherwise)


def _round_bf16() -> None:
    builder = interpreter.InterpreterBuilder
    convert = interpreter._convert_float
    dot, binary, ternary, unary = builder.create_dot, builder.binary_op, builder.ternary_op, builder.unary_op

    def convert_float(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.bfloat16 and target == tl.float32:
            return _to_fp32(data)
        if source == tl.float32 and target == tl.bfloat16:
            return _to_bf16(data)
        return convert(data, source, target, mode)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not _is_bf16(lhs) and not _is_bf16(rhs):
            return binary(self, lhs, rhs, op)
        return _of_result(op(_widened(lhs).data, _widened(rhs).data), lhs.dtype.scalar)

    def ternary_op(self: Any, lhs: Any, rhs: Any, other: Any, op: Any) -> Any:
        if not _is_bf16(other) or op is np.where:
            return ternary(self, lhs, rhs, other, op)
        return _of_result(op(_widened(lhs).data, _widened(rhs).data, _widened(other).data), tl.float32)

    def unary_op(self: Any, arg: Any, op: Any) -> Any:
        return _of_result(op(_widened(arg).data), arg.dtype.scalar) if _is_bf16(arg) else unary(self, arg, op)

    interpreter._convert_float = convert_float
    _replace(
        builder,
        create_dot=lambda self, a, b, *rest: dot(self, _widened(a), _widened(b), *rest),
        binary_op=binary_op,
        ternary_op=ternary_op,
        unary_op=unary_op,
    )
