#!/usr/bin/env python3
"""Trains adapters of every kind with transformers and peft, and writes down what happened.

    python make.py        # needs torch, transformers, peft, bitsandbytes

The base and the rows are those of ../train. For each case below:
NAME/                   the adapter to start from, as peft saves it, with B not zero
expected.json           losses per label before the first step, then six steps of AdamW with
                        warm-up, decay and clipping (loss and norm before clipping)
expected.safetensors    NAME.logits.* of the first row before, NAME.initial.* the magnitudes that
                        peft starts from, NAME.gradient.* of the first step, NAME.trained.* at the end

Everything in f32 on the CPU; an NF4 base is bitsandbytes' own, double-quantised, decoded to f32.
tools/lib/qwen3/tests/model/adapters.rs reads it.
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
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import save_file
from transformers import Qwen3ForCausalLM

HERE = pathlib.Path(__file__).parent
TRAIN = HERE.parent / "train"
ROWS = json.loads((TRAIN / "expected.json").read_text())["rows"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LR, DECAY, MAX_NORM, WARMUP, STEPS = 2e-2, 0.1, 0.5, 3, 6
# Settings; whether the base is NF4; the rate of B over that of A (LoRA+).
CASES = {
    "dora": (dict(r=3, lora_alpha=5, target_modules=ALL, use_dora=True), False, 1),
    "dora-nf4": (dict(r=2, lora_alpha=3, target_modules=ALL, use_dora=True, use_rslora=True), True, 4),
    "patterns": (dict(r=3, lora_alpha=4, target_modules=["q_proj", "self_attn.v_proj", "up_proj", "model.layers.0.mlp.gate_proj", "down_proj"],
                      rank_pattern={r"layers.0.self_attn.(q|k)_proj": 2, "q_proj": 5, r"^model\.layers\.1\.mlp\..*": 4},
                      alpha_pattern={"mlp.down_proj": 7, r"\d.self_attn.q_proj": 1.5}), False, 4),
    "regex": (dict(r=3, lora_alpha=5, target_modules=r"model\.layers\.1\.(self_attn\.(?!k)[kqv]|mlp\.up)_proj"), False, 1),
    "everything": (dict(r=4, lora_alpha=6, target_modules=r".*\.(0\.mlp\.(up|down)|1\.self_attn\.[vo])_proj", use_dora=True, use_rslora=True,
                        rank_pattern={r"1\..*": 2}, alpha_pattern={"up_proj": 9}), True, 4),
}


def base(nf4):
    model = Qwen3ForCausalLM.from_pretrained(TRAIN / "model", dtype=torch.float32, attn_implementation="eager")
    for name, module in model.named_modules():
        if nf4 and name.split(".")[-1] in ALL:
            codes, state = quantize_4bit(module.weight.data, blocksize=64, quant_type="nf4", compress_statistics=True)
            module.weight.data = dequantize_4bit(codes, state).to(torch.float32)
    return model


def losses(model, row):
    logits = model(input_ids=torch.tensor([row["ids"]])).logits[0]
    labels = torch.tensor([i if l else -100 for i, l in zip(row["ids"], row["labelled"])])[1:]
    nll = torch.nn.functional.cross_entropy(logits[:-1], labels, ignore_index=-100, reduction="none")
    return nll[labels != -100]


def trained(model):
    """Trained parameters by the names that they have in the file."""
    short = lambda name: name.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
    return {short(n): p for n, p in model.named_parameters() if p.requires_grad}


torch.manual_seed(20261123)
tensors, expected = {}, {"weight_decay": DECAY, "max_norm": MAX_NORM, "cases": {}}
for name, (settings, nf4, ratio) in CASES.items():
    shutil.rmtree(HERE / name, ignore_errors=True)
    model = get_peft_model(base(nf4), LoraConfig(lora_dropout=0.0, task_type="CAUSAL_LM", **settings))
    for short, p in trained(model).items():
        with torch.no_grad():
            if "magnitude" in short:
                tensors[f"{name}.initial.{short}"] = p.detach().clone()
                p.mul_(1 + 0.2 * torch.randn(p.shape))
            elif "lora_B" in short:
                p.copy_(0.1 * torch.randn(p.shape))
    model.peft_config["default"].base_model_name_or_path = "tiny"
    model.save_pretrained(HERE / name)
    (HERE / name / "README.md").unlink()

    model = PeftModel.from_pretrained(base(nf4), HERE / name, is_trainable=True).train()
    params = trained(model)
    with torch.no_grad():
        nll = [losses(model, row).tolist() for row in ROWS]
        tensors[f"{name}.logits"] = model(input_ids=torch.tensor([ROWS[0]["ids"]])).logits[0].clone()
    optimiser = create_loraplus_optimizer(model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=ratio, loraplus_weight_decay=DECAY)
    rates = [group["lr"] for group in optimiser.param_groups]
    steps = []
    for step in range(1, STEPS + 1):
        batch = [ROWS[(4 * (step - 1) + i) % len(ROWS)] for i in range(4)]
        count = sum(len(losses(model, r)) for r in batch)
        loss = sum(losses(model, r).sum() for r in batch) / count
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params.values(), float("inf"))
        if step == 1:
            tensors |= {f"{name}.gradient.{n}": p.grad.clone() for n, p in params.items()}
        torch.nn.utils.clip_grad_norm_(params.values(), MAX_NORM)
        warm = min(1, step / WARMUP)
        for group, rate in zip(optimiser.param_groups, rates):
            group["lr"] = rate * warm
        optimiser.step()
        optimiser.zero_grad()
        steps.append({"loss": loss.item(), "grad_norm": norm.item(), "lr": LR * warm, "labelled": count})
    tensors |= {f"{name}.trained.{n}": p.detach().clone() for n, p in params.items()}
    expected["cases"][name] = {"nf4": nf4, "lr_ratio": ratio, "nll": nll, "steps": steps}
save_file(tensors, HERE / "expected.safetensors")
(HERE / "expected.json").write_text(json.dumps(expected) + "\n")

files = sorted(f for f in HERE.rglob("*") if f.is_file() and f.suffix != ".py" and f.name != "provenance.json")
(HERE / "provenance.json").write_text(json.dumps({
    "made_by": "make.py", "date": str(datetime.date.today()),
    "sha256": {str(f.relative_to(HERE)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files},
    "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
                 "peft": peft.__version__, "bitsandbytes": bitsandbytes.__version__}}, indent=2) + "\n")
