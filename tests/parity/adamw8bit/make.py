#!/usr/bin/env python3
"""Writes reference.safetensors: AdamW with moments in 8 bits, by bitsandbytes.

    python make.py            # in an environment with torch, bitsandbytes, safetensors

`signed` and `unsigned` are its maps.  Coding alone: KIND.values, blocks of 256, and
KIND.codes, KIND.absmax as its CUDA kernel has them: a binary search for the nearest
value that rests on an even code where two are as near, and for `signed` a code of
the value's own sign.  The search is written out here, and held against bitsandbytes'
generic quantiser (an argmin) wherever there is no tie.

Twenty updates of 1,100 parameters, four blocks and a short one: `grads`, `start`, and
after steps STEPS params.STEP, m.codes.STEP, m.absmax.STEP, v.codes.STEP,
v.absmax.STEP.  They are bitsandbytes' own, on the CPU, with its generic quantiser for
its CPU one: that looks codes up in a table too coarse for small values, which its
CUDA kernel does not; how far that leads is in provenance.json, as a part of the way.
tools/lib/engine/tests/adamw8bit.rs reads the file.
"""
import datetime
import hashlib
import json
import pathlib
import platform

import bitsandbytes as bnb
import bitsandbytes.backends.cpu.ops as cpu
import bitsandbytes.functional as F
import torch
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
BLOCK, STEPS, SAVED = 256, 20, (1, 2, 5, 20)
LR, DECAY, BETAS, EPS = 1e-2, 0.1, (0.9, 0.999), 1e-8
rng = torch.Generator().manual_seed(20261123)
maps = {"signed": F.create_dynamic_map(signed=True), "unsigned": F.create_dynamic_map(signed=False)}


def nearest(values, code):
    """bitsandbytes' generic quantiser, which it has for types that its CPU library lacks."""
    return torch.ops.bitsandbytes.quantize_blockwise.default(values.double(), code.double(), BLOCK)


def search(code, x, signed):
    """The code that the CUDA kernel's search comes to."""
    pivot, lower, upper = 127, 0, 255
    low, high = (-1.0 if signed else 0.0), 1.0
    for step in (64, 32, 16, 8, 4, 2, 1):
        at = code[pivot]
        if x > at:
            lower, low = pivot, at
            pivot += step
        else:
            upper, high = pivot, at
            pivot -= step
    at = code[pivot]
    half = torch.tensor(0.5)
    if x > at:
        found = upper if x > (high + at) * half else pivot
    else:
        found = lower if x < (low + at) * half else pivot
    if signed and x < 0 and code[found] >= 0:
        found -= 1
    return found


def to_code(kind):
    """Five blocks: several decades; ties and an ulp to either side; hardly anything."""
    code = maps[kind]
    size = 10 ** (-7 * torch.rand(2 * BLOCK, generator=rng))
    sign = torch.randint(0, 2, (2 * BLOCK,), generator=rng) * 2 - 1
    wide = size * (sign if kind == "signed" else 1)
    ties = ((code[:-1] + code[1:]) * 0.5)[1:]  # 254, and room for the largest
    one = torch.ones(2)
    tied = [torch.cat([one, t]) for t in (ties, ties.nextafter(one[:1] * -2), ties.nextafter(one[:1] * 2))]
    blocks = torch.cat([wide, *tied]).view(-1, BLOCK)
    scale = torch.tensor([3e-4, 7.0, 1.0, 1.0, 1.0])[:, None]
    values = blocks * scale
    absmax = values.abs().amax(1)
    scaled = values / absmax[:, None]
    codes = torch.tensor([[search(code, x, kind == "signed") for x in row] for row in scaled], dtype=torch.uint8)
    generic, _ = nearest(values, code)
    for x, ours, theirs in zip(scaled.flatten(), codes.flatten().tolist(), generic.flatten().tolist()):
        pair = code[sorted((ours, theirs))]
        tied = x.double() * 2 - pair.double().sum()
        assert ours == theirs or abs(tied) < 1e-7 or (x < 0 and theirs == 127), (x, ours, theirs)
    return {f"{kind}.values": values.flatten(), f"{kind}.codes": codes.flatten(), f"{kind}.absmax": absmax}


def train(start, grads, saved=()):
    """bitsandbytes' updates; what is left after the steps `saved`, and the end."""
    p = torch.nn.Parameter(start.clone())
    optimiser = bnb.optim.AdamW8bit([p], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, min_8bit_size=0)
    out = {}
    for step, g in enumerate(grads, 1):
        p.grad = g.clone()
        optimiser.step()
        if step in saved:
            s = optimiser.state[p]
            out |= {
                f"params.{step}": p.detach().clone(),
                f"m.codes.{step}": s["state1"].clone(),
                f"m.absmax.{step}": s["absmax1"].clone(),
                f"v.codes.{step}": s["state2"].clone(),
                f"v.absmax.{step}": s["absmax2"].clone(),
            }
    return out, p.detach()


n = 4 * BLOCK + 76
drift = torch.randn(n, generator=rng) * 10 ** (-2 * torch.rand(n, generator=rng))
grads = drift * (1 + 2 * torch.randn(STEPS, n, generator=rng))
start = torch.randn(n, generator=rng) * 0.1
_, as_installed = train(start, grads)


def write(values, code, absmax_out, out, blocksize):
    assert blocksize == BLOCK
    codes, absmax = nearest(values, code)
    out.copy_(codes)
    absmax_out.copy_(absmax)


cpu._quant_blockwise_fp32_direct = write
states, end = train(start, grads, SAVED)

tensors = maps | to_code("signed") | to_code("unsigned") | {"grads": grads, "start": start} | states
path = HERE / "reference.safetensors"
save_file({k: v.contiguous() for k, v in tensors.items()}, path)
moved = (end - start).norm()
(HERE / "provenance.json").write_text(
    json.dumps(
        {
            "made_by": "make.py",
            "date": str(datetime.date.today()),
            "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "bitsandbytes": bnb.__version__},
            "update": {"lr": LR, "weight_decay": DECAY, "betas": BETAS, "eps": EPS, "steps": STEPS},
            "the_cpu_table_moves_the_end_by": float((as_installed - end).norm() / moved),
        },
        indent=2,
    )
    + "\n"
)
