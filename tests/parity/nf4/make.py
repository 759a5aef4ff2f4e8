#!/usr/bin/env python3
"""Writes reference.safetensors: what bitsandbytes makes of chosen matrices.

    python make.py            # in an environment with torch, bitsandbytes, safetensors

For each case NAME: NAME.input, NAME.packed, NAME.absmax (plain f32), NAME.values
and, with double quantisation, NAME.offset, NAME.nested_absmax, NAME.nested_codes.
The codes come from bitsandbytes' generic path, the argmin over the whole map: the
nearest code, as its CUDA kernel takes.  Its CPU kernel looks them up in a table of
65,536 entries and is off by one here and there; how often is in provenance.json.
`scales` is a case of double quantisation alone.  `map` is the dynamic map,
`levels` the NF4 table.  tools/lib/engine/tests/nf4.rs reads the file.
"""
import datetime
import hashlib
import json
import pathlib
import platform

import bitsandbytes as bnb
import bitsandbytes.functional as F
import torch
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
rng = torch.Generator().manual_seed(20261123)


def normal(*shape):
    return torch.randn(*shape, generator=rng)


levels = F.get_4bit_type("nf4", device="cpu").float()
mid = (levels[:-1] + levels[1:]) / 2


def ties():
    """Blocks with absmax 1 whose values sit on the midpoints and one ulp to each side."""
    rows = []
    for shift in (-1, 0, 1):
        row = torch.zeros(64)
        row[0] = 1.0
        at = mid.clone()
        if shift:
            at = torch.nextafter(mid, torch.full_like(mid, shift * 2.0))
        row[1:16] = at
        row[16:32] = levels
        rows.append(row)
    return torch.stack(rows)


def reciprocal():
    """Blocks in which x * (1 / absmax) and x / absmax lie on either side of a midpoint."""
    absmax = torch.rand(4000, 1, generator=rng) + 0.5
    x = mid * absmax
    steps = torch.stack([x.nextafter(x - 1), x, x.nextafter(x + 1)]).permute(1, 0, 2).reshape(4000, -1)
    differ = torch.bucketize(steps * (1 / absmax), mid) != torch.bucketize(steps / absmax, mid)
    chosen = differ.sum(1).argsort(descending=True, stable=True)[:8]
    rows = torch.zeros(8, 64)
    rows[:, :1] = absmax[chosen]
    rows[:, 1:46] = steps[chosen]
    assert differ[chosen].sum() >= 16
    return rows


def extremes():
    """Zeros, denormals, the smallest normals, huge values, one spike: a block each."""
    rows = [torch.zeros(64), normal(64) * 1e-40, normal(64) * 1.2e-38, normal(64) * 8e37]
    spike = normal(64) * 1e-3
    spike[17] = -3e38
    rows.append(spike)
    rows.append(torch.full((64,), -0.25))
    signed_zeros = torch.zeros(64)
    signed_zeros[::2] = -0.0
    rows.append(signed_zeros)
    return torch.stack(rows)


cases = {
    "random": normal(24, 128),
    "bf16": (normal(130, 130) * 0.02).bfloat16(),  # 265 blocks, the last of 4 values
    "f16": (normal(4, 64) * 0.3).half(),
    "odd": normal(7, 37),                          # 259 values: odd, 3 past a block
    "one": torch.tensor([[-0.5]]),
    "ties": ties(),
    "reciprocal": reciprocal(),
    "extremes": extremes(),
}

out = {"levels": levels, "map": F.create_dynamic_map().float()}
differs = {}


def nest(name, scales):
    offset = scales.mean()
    shifted, code = scales - offset, out["map"]
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise.default(shifted.double(), code.double(), 256)
    looked_up, state = F.quantize_blockwise(shifted, blocksize=256)
    assert torch.equal(absmax, state.absmax), name
    out.update({f"{name}.offset": offset.reshape(1), f"{name}.nested_absmax": absmax, f"{name}.nested_codes": codes})
    differs[name] = f"{int((codes != looked_up).sum())} of {codes.numel()}"


for name, w in cases.items():
    packed, state = F.quantize_4bit(w, blocksize=64, quant_type="nf4")
    out |= {f"{name}.input": w, f"{name}.packed": packed.reshape(-1), f"{name}.absmax": state.absmax}
    if name != "extremes":  # the f32 mean of its scales overflows
        nest(name, state.absmax)
    # Not where bitsandbytes' own dequantisation is wrong: AVX-512 and columns that 64 does not divide.
    if w.shape[-1] % 64 == 0:
        out[f"{name}.values"] = F.dequantize_4bit(packed, state).float()

out["scales.input"] = normal(64, 4000).abs().amax(0)
nest("scales", out["scales.input"])

out = {k: v.contiguous().clone() for k, v in out.items()}
save_file(out, HERE / "reference.safetensors")
digest = hashlib.sha256((HERE / "reference.safetensors").read_bytes()).hexdigest()
(HERE / "provenance.json").write_text(json.dumps({
    "made_by": "make.py", "date": str(datetime.date.today()), "sha256": {"reference.safetensors": digest},
    "versions": {"python": platform.python_version(), "torch": torch.__version__, "bitsandbytes": bnb.__version__},
    "nested_codes_where_the_cpu_lookup_differs": differs,
}, indent=2) + "\n")
