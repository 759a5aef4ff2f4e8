#!/usr/bin/env python3
"""Merges ../files/adapter into ../files/sharded with peft, in bfloat16.

    python make.py        # needs torch, transformers, peft

expected.safetensors   the products that the adapter changes

tests/qlora-train-files.rs reads it.
"""
import datetime
import hashlib
import json
import pathlib
import platform

import peft
import torch
import transformers
from safetensors.torch import save_file
from transformers import Qwen3ForCausalLM

HERE = pathlib.Path(__file__).parent
base = Qwen3ForCausalLM.from_pretrained(HERE / "../files/sharded", dtype=torch.bfloat16)
merged = peft.PeftModel.from_pretrained(base, HERE / "../files/adapter").merge_and_unload()
changed = {k: v.contiguous() for k, v in merged.state_dict().items() if "q_proj" in k or "down_proj" in k}
assert len(changed) == 4 and all(v.dtype == torch.bfloat16 for v in changed.values())
save_file(changed, HERE / "expected.safetensors")
(HERE / "provenance.json").write_text(json.dumps({
    "made_by": "make.py", "date": str(datetime.date.today()),
    "sha256": {"expected.safetensors": hashlib.sha256((HERE / "expected.safetensors").read_bytes()).hexdigest()},
    "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
                 "peft": peft.__version__}}, indent=2) + "\n")
