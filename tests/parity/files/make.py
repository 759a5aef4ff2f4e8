#!/usr/bin/env python3
"""Writes model folders and an adapter as today's libraries save them.

    python make.py        # needs torch, transformers, peft, bitsandbytes

sharded/   a tiny random Qwen3 from transformers' save_pretrained, in shards, bf16
nf4/       the same loaded in 4 bits with double quantisation, and saved
nf4-plain/ the same without double quantisation, bitsandbytes' own default
adapter/   a rank-stabilised LoRA of it from peft's save_pretrained
expected.safetensors   tensors of them, in f32, as torch holds them

tools/lib/qwen3/tests/{checkpoint,adapter}.rs read them.
"""
import datetime
import hashlib
import json
import pathlib
import platform
import shutil

import bitsandbytes
import peft
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3Config, Qwen3ForCausalLM

HERE = pathlib.Path(__file__).parent
FOLDERS = ["sharded", "nf4", "nf4-plain", "adapter"]
for name in FOLDERS:
    shutil.rmtree(HERE / name, ignore_errors=True)
torch.manual_seed(20261123)

config = Qwen3Config(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=256, rope_theta=1e6, tie_word_embeddings=False,
    bos_token_id=0, eos_token_id=1)
model = Qwen3ForCausalLM(config).to(torch.bfloat16)
for p in model.parameters():
    if p.ndim == 1:
        p.data += 0.1 * torch.randn(p.shape)
model.generation_config.eos_token_id = [1, 0]
model.save_pretrained(HERE / "sharded", max_shard_size="60KB")
some = ["model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.q_norm", "model.norm", "lm_head"]
expected = {f"sharded.{name}.weight": model.get_submodule(name).weight.detach().float() for name in some}

for folder, double in (("nf4", True), ("nf4-plain", False)):
    quantized = AutoModelForCausalLM.from_pretrained(
        HERE / "sharded", device_map="cpu",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
                                               bnb_4bit_compute_dtype=torch.bfloat16))
    quantized.save_pretrained(HERE / folder)
    for name in ("self_attn.o_proj", "mlp.gate_proj"):
        weight = quantized.get_submodule(f"model.layers.1.{name}").weight
        state = weight.quant_state
        state.dtype = torch.float32  # as they are before rounding to the compute type
        expected[f"{folder}.model.layers.1.{name}.weight"] = dequantize_4bit(weight.data, state).float().reshape(state.shape)

base = Qwen3ForCausalLM.from_pretrained(HERE / "sharded", dtype=torch.float32)
lora = get_peft_model(base, LoraConfig(
    r=3, lora_alpha=12, lora_dropout=0.1, use_rslora=True, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
for k, p in lora.named_parameters():
    if "lora_B" in k:
        p.data = 0.1 * torch.randn(p.shape)
lora.peft_config["default"].base_model_name_or_path = "tiny"
lora.save_pretrained(HERE / "adapter")
for k, p in lora.named_parameters():
    if "layers.1." in k and "lora_" in k:
        expected["adapter." + k.replace(".default", "").removeprefix("base_model.model.")] = p.data
expected["adapter.scaling"] = torch.tensor([next(m.scaling["default"] for m in lora.modules() if isinstance(getattr(m, "scaling", 0), dict))])
(HERE / "adapter" / "README.md").unlink()
save_file({k: v.contiguous().clone() for k, v in expected.items()}, HERE / "expected.safetensors")

files = sorted(f for f in HERE.rglob("*") if f.is_file() and f.name not in ("make.py", "provenance.json"))
(HERE / "provenance.json").write_text(json.dumps({
    "made_by": "make.py", "date": str(datetime.date.today()),
    "sha256": {str(f.relative_to(HERE)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files},
    "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
                 "peft": peft.__version__, "bitsandbytes": bitsandbytes.__version__}}, indent=2) + "\n")
