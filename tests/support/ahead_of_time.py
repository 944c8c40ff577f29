"""Compile a Triton kernel for a GPU that need not be installed, and read off the resources that it uses.

    build = compile_for(80, kernel, x_ptr=torch.empty(4096, device="meta"), n=4096, BLOCK=1024, num_warps=4)
    assert build.fits and build.stack == 0 and build.count("mma.sync")

Arguments are those of a launch and are specialised in the same way: a stride of 1 is a constant, divisibility by 16 is known,
and a tensor on the meta device counts as aligned. So the build is the one that such a launch would run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes of shared memory that one block may use, by compute capability: A100, RTX 3090, L40S, H100, B200, RTX 5090. None
from 8.0 on has less than 8.6."""
TENSOR_MEMORY = 512
"""Columns of tensor memory that one block may use, from compute capability 100 on."""
WARP = 32


@dataclass(frozen=True, slots=True)
class Build:
    """One kernel for one target.

    registers: per thread. stack, local: bytes of a thread outside its registers (spills and arrays).
    shared: bytes per block. tensor_columns: tensor memory per block. instructions: counts in the PTX by name with all suffixes.
    """

    capability: int
    registers: int
    stack: int
    local: int
    shared: int
    tensor_columns: int
    instructions: Counter[str]

    @property
    def fits(self) -> bool:
        """Whether the chip can launch it. If not, Triton raises `OutOfResources` there."""
        return self.shared <= SHARED_MEMORY[self.capability] and self.tensor_columns <= TENSOR_MEMORY

    def count(self, name: str) -> int:
        """The number of instructions with this name, such as "wgmma.mma_async" or "atom", and any suffixes."""
        return sum(n for full, n in self.instructions.items() if f"{full}.".startswith(f"{name}."))


def compile_for(capability: int, kernel: JITFunction[Any], **arguments: Any) -> Build:
    """The build of `kernel` that a launch with these arguments would run; `num_warps` and `num_stages` may be among them.

    The capability is one of `SHARED_MEMORY`. Does not work under Triton's interpreter.
    """
    target = GPUTarget("cuda", capability, WARP)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**arguments)
    signature, constants, attributes = {}, {}, {}
    for parameter, (kind, key) in zip(kernel.params, specialization, strict=True):
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.num,] = bound[parameter.name]
        elif key:
            attributes[parameter.num,] = backend.parse_attr(key)
    compiled = compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)
    usage = _resource_usage(compiled.asm["cubin"])
    return Build(
        capability=capability,
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        shared=compiled.metadata.shared,
        tensor_columns=compiled.metadata.tmem_size or 0,
        instructions=_instructions(compiled.asm["ptx"]),
    )


def pairwise(firsts: Sequence[Any], seconds: Sequence[Any], thirds: Sequence[Any]) -> list[Any]:
    """Parameters for all combinations; those that hold no new pair of values are `exhaustive`."""
    chosen = []
    for (i, first), (j, second), (k, third) in product(enumerate(firsts), enumerate(seconds), enumerate(thirds)):
        marks = () if (i + j) % len(thirds) == k else (pytest.mark.exhaustive,)
        chosen.append(pytest.param(first, second, third, marks=marks))
    return chosen


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", report)}


def _instructions(ptx: str) -> Counter[str]:
    """Mnemonics of a PTX text: the first word of each statement, a predicate aside."""
    return Counter(re.findall(r"^[ \t{]*(?:@!?%\w+\s+)?([a-z]\w*(?:\.[\w:]+)+)\s", ptx, re.MULTILINE))
