"""
What a step on a GPU costs on paper: its operations and kernels, the bytes that each moves, and what kernels become as
machine code. The GPU needn't be there: tensors have only a shape, and the compiler says the rest.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


_KERNEL_FILES = ("triton_refiner", "triton_attention_refiner")
_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8",
}  # fmt: skip


class Launch(NamedTuple):
    """A kernel's call. `arguments` are by name: tensors, numbers, and what the kernel is compiled for."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def compiled_for(self) -> str:
        """The same for launches of which the compiler makes the same code."""
        arguments = {
            name: (value.dtype, value.storage_offset()) if isinstance(value, torch.Tensor) else value
            for name, value in self.arguments.items()
        }
        return str((self.name, arguments, self.options))


class Operation(NamedTuple):
    """
    Something that is launched: one of torch's operations, or a kernel. `moved` counts the bytes of all that it reads
    and writes, each once; `flops` the operations of products and convolutions, of torch's only.
    """

    name: str
    moved: int
    flops: int
    launch: Launch | None


class Compiled(NamedTuple):
    """A kernel as machine code: `loops` are the instructions of a step of each of its loops, `outside` all others."""

    registers: int  # of a thread
    spilled: int  # bytes of a thread
    shared: int  # bytes of a program
    warps: int
    outside: int
    loops: tuple[int, ...]


@contextmanager
def imagined_gpu() -> Iterator[None]:
    """Tensors on "cuda" have only a shape here, and kernels aren't run. Their tiles have the default sizes."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(patch("torch.cuda.current_device", return_value=0))
        for name in _KERNEL_FILES:
            stack.enter_context(patch(f"refiner_hf.{name}.why_no_kernels", return_value=None))
        tiles = "refiner_hf.triton_tiles_refiner.chosen_tiles"
        stack.enter_context(patch(tiles, lambda kernels, device: kernels.default))
        yield


def operations_of(step: Callable[[], object]) -> list[Operation]:
    """All that a step launches, in order; within [`imagined_gpu`]."""
    from triton.runtime.jit import JITFunction

    found: list[Operation] = []

    def run(kernel, *values, **keywords):
        found.append(_launched(kernel, *values, **keywords))

    with patch.object(JITFunction, "run", run), _Operations(found):
        step()
    return found


def launches_of(step: Callable[[], object]) -> list[Launch]:
    """The kernels that a step launches, in order; within [`imagined_gpu`]."""
    return [operation.launch for operation in operations_of(step) if operation.launch is not None]


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compiles a kernel as this launch would on a GPU of a compute capability, such as 90 for 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget

    types, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        # As a launch does: ones become constants, and multiples of 16 are known for what they are.
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            types[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            types[parameter.name] = f"*{_TYPES[value.dtype]}"
            whole = value.storage_offset() * value.itemsize % 16 == 0
        else:
            types[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            whole = isinstance(value, int) and value % 16 == 0
        if whole:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(launch.kernel, types, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = _dump("--dump-resource-usage", file.name), _dump("-sass", file.name)
    registers, stack = (int(usage.partition(f"{name}:")[2].split()[0]) for name in ("REG", "STACK"))
    return Compiled(registers, stack, compiled.metadata.shared, compiled.metadata.num_warps, *_count(code))


def _launched(kernel: Any, *values: Any, grid: Any, warmup: bool, **keywords: Any) -> Operation:
    names = [parameter.name for parameter in kernel.params]
    arguments = {**dict(zip(names, values)), **{name: keywords.pop(name) for name in names if name in keywords}}
    tensors = {_memory(each): each for each in arguments.values() if isinstance(each, torch.Tensor)}
    # Of a view of a packed map also what it leaves out.
    moved = sum(
        each.numel() * each.itemsize if each.is_contiguous() else each.untyped_storage().nbytes()
        for each in tensors.values()
    )
    launch = Launch(kernel, prod(grid), arguments, keywords)
    return Operation(launch.name, moved, 0, launch)


class _Operations(TorchDispatchMode):
    """Notes down torch's operations that read or write memory."""

    def __init__(self, found: list[Operation]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace.startswith("refiner_hf"):  # one of ours: what counts is what it launches
            with self:
                return function._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        result = function(*args, **kwargs)
        read, written = _tensors((args, kwargs)), _tensors(result)
        aliases = {_memory(each) for each in read} & {_memory(each) for each in written}
        if written and "empty" not in str(function) and (not aliases or function._schema.is_mutable):
            count = flop_registry.get(function.overloadpacket)
            flops = 0 if count is None else count(*args, **kwargs, out_val=result)
            moved = sum(each.numel() * each.itemsize for each in read + written)
            name = str(function.overloadpacket).removeprefix("aten.")
            before = self.found[-1].name if self.found else ""
            # On CUDA the softmax converts by itself; tensors that have only a shape are converted before, and after.
            if (before, name) in (("_to_copy", "_softmax"), ("_softmax_backward_data", "_to_copy")):
                half = read[0].numel() * read[0].itemsize // 2
                moved = moved - half if name == "_softmax" else self.found[-1].moved - half
                name = name if name == "_softmax" else before
                self.found.pop()
            self.found.append(Operation(name, moved, flops, None))
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _dump(what: str, file: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), what, file], capture_output=True, text=True, check=True).stdout


def _count(code: str) -> tuple[int, tuple[int, ...]]:
    """Instructions outside of loops, and of each loop: what lies between a jump backward and where it goes."""
    instructions = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)]
    jumps = [
        (int(target, 16), at) for at, text in instructions for target in re.findall(r"BRA\b.* 0x([0-9a-f]+)", text)
    ]
    ends = [at for at, text in instructions if "EXIT" in text]
    bodies = [(target, at) for target, at in jumps if target < at < ends[-1]]
    within = [[at for at, _ in instructions if first <= at <= last] for first, last in bodies]
    last = ends[-1]  # behind it is only padding
    everything = sum(at <= last for at, _ in instructions)
    return everything - len(set().union(*within)), tuple(len(loop) for loop in within)
