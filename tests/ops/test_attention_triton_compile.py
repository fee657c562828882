"""The Triton attention kernels compiled for GPUs that are not here: every row of the table of tile sizes, within a budget.

attention_triton_budget.json gives for each row what the compiler made of it: registers of a thread, bytes of shared memory,
instructions of the innermost loop over whole tiles, and whether tiles come by the copy engine (TMA). No innermost loop may spill,
those over the edges included.
The numbers are upper limits for Triton 3.6 and 3.7; the version that is installed is tested, and another one, unpacked from its
wheel, by PYTHONPATH=<folder>.
`python -m tests.ops.test_attention_triton_compile [--widen]` writes the file anew.
"""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.attention import triton_configs, triton_kernels
from bigmodel_kernels.ops.attention_varlen import triton_kernels as varlen
from tests.triton_aot import SHARED_LIMIT, compiling

BUDGET = Path(__file__).with_name("attention_triton_budget.json")
SLACK = 1.15  # of what the budget gives, for versions of the compiler
NAMES = {"forward_kernel": "forward", "query_kernel": "query", "key_kernel": "key", "mask_kernel": "mask"}
# Dropout is compiled for one head dimension of every GPU, to save time.
DROPOUT_DIMS = {"sm_80": (128,), "sm_86": (64,), "sm_90": (256,)}
# Calls for sequences laid end to end, whose tiles never come by descriptors, are compiled for these; for a head dimension of 64
# without a budget, in test_other_calls_for_sequences_compile.
VARLEN_ROWS = [(gpu, "bfloat16", head_dim) for gpu in ("sm_80", "sm_90") for head_dim in (128, 256)]
VARLEN_ROWS += [("sm_90", "float32", head_dim) for head_dim in (128, 256)]
WGMMA_ROWS = 64  # of the left operand, below which the compiler takes the older instruction
ROWS = [
    *((gpu, "bfloat16", head_dim) for gpu in ("sm_80", "sm_86", "sm_90") for head_dim in (64, 128, 256)),
    *((gpu, "float32", head_dim) for gpu in ("sm_80", "sm_90") for head_dim in (64, 128, 256)),
]
OPTIONS = {
    "mask_and_window": {"mask": True, "window": (100, 20)},
    "scores": {"softcap": 20.0, "alibi": True, "is_causal": True},
    "odd": {"head_dim": 80, "length": 333},
}


def product_instruction(gpu, dtype, kernel, constants):
    if dtype == "float32":
        return "FFMA"
    rows = constants["BLOCK_N" if kernel == "key" else "BLOCK_M"]
    return "HGMMA" if gpu == "sm_90" and rows >= WGMMA_ROWS else "HMMA"


def compile_call(gpu, dtype, head_dim, monkeypatch, only=None, mask=False, alibi=False, length=512, **options):
    """What a call's forward and backward would launch, by the table's names."""
    q, k, v, grad_out = (torch.empty(2, 4, length, head_dim, dtype=getattr(torch, dtype)) for _ in range(4))
    mask = torch.empty(length, length, dtype=q.dtype) if mask else None
    slopes = torch.ones(4) if alibi else None
    args = list(bmk.attention.prepare(q, k, v, attn_mask=mask, alibi_slopes=slopes, **options))
    args[5] = torch.zeros(1, dtype=torch.int64)
    with compiling(gpu, monkeypatch, only) as binaries:
        out, lse = triton_kernels.fwd(*args)
        triton_kernels.bwd(grad_out, lse, out, lse, None, mask is not None, *args)
    return {NAMES[binary.name]: binary for binary in binaries}


def compile_varlen(gpu, dtype, head_dim, monkeypatch, sequences=2, alibi=False, length=512, **options):
    """The same for sequences laid end to end."""
    q, k, v, grad_out = (torch.empty(sequences * length, 4, head_dim, dtype=getattr(torch, dtype)) for _ in range(4))
    ends = torch.arange(0, (sequences + 1) * length, length, dtype=torch.int32)
    slopes = torch.ones(4) if alibi else None
    args = list(bmk.attention_varlen.prepare(q, k, v, ends, ends, length, length, alibi_slopes=slopes, **options))
    args[6] = torch.zeros(1, dtype=torch.int64)
    with compiling(gpu, monkeypatch) as binaries:
        out, lse = varlen.fwd(*args)
        varlen.bwd(grad_out, lse, out, lse, None, *args)
    return {NAMES[binary.name]: binary for binary in binaries}


def innermost_loops(sass):
    """The bodies of the loops that hold no other, as lists of instructions."""
    lines = [line for line in sass.splitlines() if re.match(r"\s*(\.L_|/\*[0-9a-f]{4,}\*/)", line)]
    labels = {m[1]: n for n, line in enumerate(lines) if (m := re.match(r"\s*(\.L_\w+):", line))}
    jumps = [(n, re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)) for n, line in enumerate(lines)]
    spans = [(labels[m[1]], n) for n, m in jumps if m and labels[m[1]] < n]
    inner = [(a, b) for a, b in spans if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in spans)]
    return [[line for line in lines[a : b + 1] if "/*" in line] for a, b in inner]


def measure(binary, instruction):
    """Registers, shared memory, instructions of the shortest loop with products, over whole tiles; spills of the worst loop;
    whether that shortest loop has its tiles copied by the engine."""
    loops = innermost_loops(binary.sass)
    with_products = [body for body in loops if any(instruction in line for line in body)]
    assert with_products, f"no {instruction} in the loops of {binary}"
    shortest = min(with_products, key=len)
    copies = int(any("UTMALDG" in line for line in shortest))
    local = max(sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in body) for body in loops)
    return {
        "registers": binary.registers,
        "shared": binary.shared,
        "loop": len(shortest),
        "local": local,
        "copies": copies,
    }


def compile_row(gpu, dtype, head_dim, monkeypatch):
    """{kernel: what was measured} of a row of the table: a causal call and the mask's gradient, also with dropout."""
    found = {}
    for suffix, options in (("", {}), (" dropout", {"dropout_p": 0.1})):
        binaries = {}
        if not suffix or head_dim in DROPOUT_DIMS[gpu]:
            binaries |= compile_call(gpu, dtype, head_dim, monkeypatch, is_causal=True, **options)
            binaries |= compile_call(gpu, dtype, head_dim, monkeypatch, only="mask_kernel", mask=True, **options)
        if (gpu, dtype, head_dim) in VARLEN_ROWS and not suffix:
            of_sequences = compile_varlen(gpu, dtype, head_dim, monkeypatch, is_causal=True)
            binaries |= {f"{kernel} varlen": binary for kernel, binary in of_sequences.items()}
        for kernel, binary in binaries.items():
            instruction = product_instruction(gpu, dtype, kernel.removesuffix(" varlen"), binary.constants)
            found[kernel + suffix] = measure(binary, instruction)
    return found


def row_id(gpu, dtype, head_dim):
    return f"{gpu} {dtype} {head_dim}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row_id(*row))
def test_table_is_within_budget(row, monkeypatch):
    budget = json.loads(BUDGET.read_text())[row_id(*row)]
    found = compile_row(*row, monkeypatch)
    assert sorted(found) == sorted(budget)
    for kernel, numbers in found.items():
        allowed = budget[kernel]
        assert numbers["shared"] <= min(allowed["shared"] * SLACK, SHARED_LIMIT[row[0]]), (kernel, numbers)
        assert numbers["registers"] <= allowed["registers"] * SLACK, (kernel, numbers)
        assert numbers["loop"] <= allowed["loop"] * SLACK, (kernel, numbers)
        assert numbers["local"] == 0, (kernel, numbers)
        assert numbers["copies"] == allowed["copies"], (kernel, numbers)


# Sequences laid end to end take the same kernels: other scores and odd sizes compile here for one GPU, there for the other.
@pytest.mark.parametrize(
    ("options", "gpu"),
    [("mask_and_window", "sm_80"), ("mask_and_window", "sm_90"), ("scores", "sm_90"), ("odd", "sm_90")],
)
def test_other_calls_compile(options, gpu, monkeypatch):
    options = {"head_dim": 64, **OPTIONS[options]}
    binaries = compile_call(gpu, "float16", options.pop("head_dim"), monkeypatch, **options)
    assert len(binaries) == 3 + options.get("mask", False)
    for kernel, binary in binaries.items():
        measure(binary, product_instruction(gpu, "float16", kernel, binary.constants))
        assert binary.shared <= SHARED_LIMIT[gpu], binary


@pytest.mark.parametrize(
    ("options", "gpu"),
    [
        ({"sequences": 300, "window": (100, 20)}, "sm_80"),
        ({"sequences": 300, "window": (100, 20)}, "sm_90"),
        ({"softcap": 20.0, "alibi": True}, "sm_80"),
        ({"head_dim": 80, "length": 333, "dropout_p": 0.1}, "sm_80"),
    ],
    ids=["many-sm_80", "many-sm_90", "scores-sm_80", "odd-sm_80"],
)
def test_other_calls_for_sequences_compile(options, gpu, monkeypatch):
    options = {"head_dim": 64, **options}
    binaries = compile_varlen(gpu, "float16", options.pop("head_dim"), monkeypatch, **options)
    assert len(binaries) == 3
    for kernel, binary in binaries.items():
        assert measure(binary, product_instruction(gpu, "float16", kernel, binary.constants))["local"] == 0, binary
        assert binary.shared <= SHARED_LIMIT[gpu], binary


@pytest.mark.parametrize("head_dim", [64, 128])
def test_tensors_that_the_copy_engine_cannot_read_go_by_pointers(head_dim, monkeypatch):
    q = torch.empty(1, 1, 513, head_dim, dtype=torch.float16).flatten()[1 : 1 - head_dim].view(1, 1, 512, head_dim)
    args = bmk.attention.prepare(q, q, q, is_causal=True)
    with compiling("sm_90", monkeypatch) as binaries:
        out, lse = triton_kernels.fwd(*args)
        triton_kernels.bwd(q, None, out, lse, None, False, *args)
    assert len(binaries) == 3
    for binary in binaries:
        assert "UTMALDG" not in binary.sass
        instruction = product_instruction("sm_90", "float16", NAMES[binary.name], binary.constants)
        assert measure(binary, instruction)["local"] == 0, binary


def test_every_row_of_the_table_is_tested():
    tested = {(gpu, head_dim) for gpu, dtype, head_dim in ROWS if dtype != "float32"}
    in_table = {(gpu, d) for gpu, kernels in triton_configs.HALF.items() for by_dim in kernels.values() for d in by_dim}
    assert tested == in_table
    assert all(set(by_dim) == {64, 128, 256} for by_dim in triton_configs.SINGLE.values())


if __name__ == "__main__":
    budget = json.loads(BUDGET.read_text()) if sys.argv[1:] == ["--widen"] else {}  # --widen: for one more version
    for row in ROWS:
        old = budget.get(row_id(*row), {})
        found = compile_row(*row, pytest.MonkeyPatch())
        budget[row_id(*row)] = {
            kernel: {key: max(n, old.get(kernel, {}).get(key, 0)) for key, n in numbers.items()}
            for kernel, numbers in found.items()
        }
    BUDGET.write_text(json.dumps(budget, indent=2) + "\n")
