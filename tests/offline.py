"""
What the compiler makes of the kernels, without a GPU: registers, spills, shared memory.

    PYTHONPATH=. python tests/offline.py [head_dim [bf16 | fp16 | fp32]]

One line for each shipped configuration, compiled for sm_90 (H100) with the assembler that Triton
brings. These numbers chose the tile sizes in kernels/triton_attention.py; spilled registers or
tensor cores that run synchronously there are a bug (tests/test_attention.py).

Left out: speed. That takes a GPU: bench/.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from kernels import triton_kernels
from kernels.triton_attention import block_d, interpreted, tile_config
from kernels.triton_kernels import triton

INTEGERS = ("q_hi_ptr", "q_pos_ptr", "k_hi_ptr", "index_ptr", "work_ptr", "pieces_ptr")
FLOATS = ("lse_ptr", "delta_ptr", "part_ptr", "part_lse_ptr")


def _source(kernel, config, head_dim, *, group, dtype):
    """A kernel as the launchers of kernels/triton_attention.py call it."""
    width = block_d(head_dim)
    rows = {name: config.block_m for name in ("q_desc", "do_desc")}
    rows |= {name: config.block_n for name in ("k_desc", "v_desc")}
    types = {name: "*i32" for name in INTEGERS} | {name: "*fp32" for name in FLOATS}
    types["scale"] = "fp32"
    types |= {name: f"tensordesc<{dtype}[1, {n}, {width}]>" for name, n in rows.items()}
    values = dict(
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=width,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
    )
    function = getattr(triton_kernels, kernel)
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        default = f"*{dtype}" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in values else types.get(name, default)
        if name in values:
            constants[i,] = values[name]
        elif name.endswith("_ptr") or "stride" in name:
            attributes[i,] = [["tt.divisibility", 16]]
    return triton.compiler.ASTSource(function, signature, constants, attributes)


def _assemble(ptx):
    """What ptxas says of a kernel."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx, encoding="utf-8")
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(source)]
        command += ["-o", str(source.with_suffix(".cubin"))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def compile_offline(kernel, config, head_dim=128, *, group=7, dtype="bf16"):
    """Compile a kernel for sm_90: {registers, spilled_bytes, shared, wgmma, tma, serialized}.

    kernel: its name in kernels/triton_kernels.py. config: a Tiling. dtype: bf16, fp16 or fp32.
    The last three count instructions of the tensor cores and of the copy engine, and the
    assembler's warnings that it cannot run the former asynchronously.
    """
    from triton.backends.compiler import GPUTarget

    source = _source(kernel, config, head_dim, group=group, dtype=dtype)
    options = dict(num_warps=config.warps, num_stages=config.stages)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = built.asm["ptx"]
    log = _assemble(ptx)
    return dict(
        registers=int(re.search(r"(\d+) registers", log)[1]),
        spilled_bytes=int(re.search(r"(\d+) bytes spill stores", log)[1]),
        shared=built.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        tma=ptx.count("cp.async.bulk.tensor"),
        serialized=log.count("serialized"),
    )


def main():
    """Print what the compiler makes of the shipped configurations; 2 where it cannot run."""
    head_dim, dtype = int((sys.argv[1:] or [128])[0]), (sys.argv[2:] or ["bf16"])[0]
    if triton is None or interpreted():
        print("offline compilation needs Triton (and no TRITON_INTERPRET)")
        return 2
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    print(
        f"sm_90, {dtype}, head_dim {head_dim}, 7 query heads a key head, "
        f"torch {torch.__version__}, triton {triton.__version__}"
    )
    for name in ("forward", "few", "dq", "dkdv"):
        config = tile_config(name, head_dim, torch_dtype, torch.device("cpu"))
        kernel = {"few": "forward"}.get(name, name) + "_kernel"
        found = compile_offline(kernel, config, head_dim, dtype=dtype)
        shape = "tile {}x{}, {} warps, {} stages".format(*config)
        numbers = " ".join(f"{key} {value}" for key, value in found.items())
        print(f"{name:8} {shape:33} {numbers}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
