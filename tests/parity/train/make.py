#!/usr/bin/env python3
"""Trains a tiny random Qwen3 with transformers and peft, and writes down what happened.

    python make.py        # needs torch, transformers, peft

model/          2 layers, 6 query and 2 key/value heads of 10 (so not the hidden size), untied
adapter/        a LoRA of rank 3 on all seven modules, with B not zero
expected.json   rows (ids, labels), the base's and the adapter's loss per label, ten steps of
                AdamW with warm-up, decay and clipping (loss and norm before clipping),
                greedy continuations of both
expected.safetensors   gradients of the first step; the factors after the tenth

Everything in f32 on the CPU. tools/lib/qwen3/tests/model/peft.rs reads it.
"""
import datetime
import hashlib
import json
import pathlib
import platform
import shutil

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

HERE = pathlib.Path(__file__).parent
for name in ("model", "adapter"):
    shutil.rmtree(HERE / name, ignore_errors=True)
torch.manual_seed(20261123)
config = Qwen3Config(
    vocab_size=61, hidden_size=36, intermediate_size=52, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
    head_dim=10, max_position_embeddings=128, tie_word_embeddings=False, rms_norm_eps=1e-6, bos_token_id=None, eos_token_id=60,
    initializer_range=0.15, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, use_sliding_window=False)
base = Qwen3ForCausalLM(config)
with torch.no_grad():
    for name, p in base.named_parameters():
        if "norm" in name:
            p.copy_(1 + 0.2 * torch.randn(p.shape))
base.generation_config = GenerationConfig(eos_token_id=[60])
base.save_pretrained(HERE / "model")
base = Qwen3ForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32, attn_implementation="eager")
lora = get_peft_model(base, LoraConfig(r=3, lora_alpha=5, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]))
with torch.no_grad():
    for name, p in lora.named_parameters():
        if "lora_B" in name:
            p.copy_(0.1 * torch.randn(p.shape))
lora.peft_config["default"].base_model_name_or_path = "tiny"
lora.save_pretrained(HERE / "adapter")
(HERE / "adapter" / "README.md").unlink()

rows = []
for length, start in [(9, 4), (33, 20), (70, 41), (5, 1), (17, 11), (28, 20), (12, 3), (41, 40)]:
    ids = torch.randint(0, 60, (length,)).tolist()
    rows.append({"ids": ids, "labelled": [i >= start and i % 7 != 6 for i in range(length)]})


def losses(model, row):
    logits = model(input_ids=torch.tensor([row["ids"]])).logits[0]
    labels = torch.tensor([i if l else -100 for i, l in zip(row["ids"], row["labelled"])])[1:]
    nll = torch.nn.functional.cross_entropy(logits[:-1], labels, ignore_index=-100, reduction="none")
    return nll[labels != -100]


expected = {"rows": rows}
with torch.no_grad():
    with lora.disable_adapter():
        expected["nll_base"] = [losses(lora, r).tolist() for r in rows]
    expected["nll_adapter"] = [losses(lora, r).tolist() for r in rows]
    prompts = [r["ids"][:6] for r in rows]
    greedy = {}
    for name in ("base", "adapter"):
        replies = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            how = dict(attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
            if name == "base":
                with lora.disable_adapter():
                    out = lora.generate(input_ids=ids, **how)
            else:
                out = lora.generate(input_ids=ids, **how)
            replies.append(out[0, len(prompt):].tolist())
        greedy[name] = replies
    expected["prompts"], expected["greedy"] = prompts, greedy

lora = PeftModel.from_pretrained(
    Qwen3ForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32, attn_implementation="eager"), HERE / "adapter", is_trainable=True)
params = {n.replace(".default", ""): p for n, p in lora.named_parameters() if p.requires_grad}
lr, decay, max_norm, warmup = 2e-2, 0.1, 0.5, 3
optimiser = torch.optim.AdamW(params.values(), lr=lr, weight_decay=decay)
tensors, steps = {}, []
for step in range(1, 11):
    batch = [rows[(4 * (step - 1) + i) % len(rows)] for i in range(4)]
    count = sum(len(losses(lora, r)) for r in batch)
    loss = sum(losses(lora, r).sum() for r in batch) / count
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(params.values(), float("inf"))
    if step == 1:
        tensors |= {"gradient." + n: p.grad.clone() for n, p in params.items()}
    torch.nn.utils.clip_grad_norm_(params.values(), max_norm)
    rate = lr * min(1, step / warmup)
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.step()
    optimiser.zero_grad()
    steps.append({"loss": loss.item(), "grad_norm": norm.item(), "lr": rate, "labelled": count})
tensors |= {"trained." + n: p.detach().clone() for n, p in params.items()}
expected |= {"steps": steps, "weight_decay": decay, "max_norm": max_norm}
save_file(tensors, HERE / "expected.safetensors")
(HERE / "expected.json").write_text(json.dumps(expected) + "\n")

files = sorted(f for f in HERE.rglob("*") if f.is_file() and f.suffix != ".py" and f.name != "provenance.json")
(HERE / "provenance.json").write_text(json.dumps({
    "made_by": "make.py", "date": str(datetime.date.today()),
    "sha256": {str(f.relative_to(HERE)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files},
    "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
                 "peft": peft.__version__}}, indent=2) + "\n")
