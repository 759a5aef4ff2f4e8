#!/usr/bin/env python3
"""transformers and PEFT on the rows of `bench`, to be set beside its figures.

    python peer.py [--threads N] [--rows equal|real] [--sort] [--steps 16]

Needs torch, transformers and peft (tests/parity/run makes a virtual environment with them).
The shape of `bench`'s middling model with random weights, f32, LoRA of rank 16 on all seven
projections, AdamW, clipped; steps of 8 rows padded to the longest of them (--sort: rows of
like length together, as `group_by_length` puts them). Only real tokens count. Prints a line
of JSON.
"""
import argparse
import json
import os
import pathlib
import resource
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

STEP, WARM_UP = 8, 2
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lengths(which):
    """Tokens of prompt and reply: one list for both sides."""
    real = pathlib.Path(__file__).parents[2] / "tools/qlora-train/src/lengths.json"
    return json.loads(real.read_text()) if which == "real" else [(27, 101)] * 128


def batch(rows, vocabulary):
    """Ids and labels `[rows, longest]`. Padding stands behind the rows, where a causal
    model needs no mask to keep it out."""
    longest = max(prompt + reply for prompt, reply in rows)
    ids = torch.randint(vocabulary, (len(rows), longest))
    labels = torch.full_like(ids, -100)
    for i, (prompt, reply) in enumerate(rows):
        labels[i, prompt : prompt + reply] = ids[i, prompt : prompt + reply]
    return ids, labels


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rows", choices=["equal", "real"], default="real")
    parser.add_argument("--sort", action="store_true")
    parser.add_argument("--steps", type=int, default=16)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=2048, hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, tie_word_embeddings=True, max_position_embeddings=1024)
    lora = LoraConfig(r=16, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    model = get_peft_model(Qwen3ForCausalLM(config), lora).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4)

    rows = lengths(args.rows)
    if args.sort:
        rows.sort(key=sum)
    steps = [rows[at : at + STEP] for at in range(0, len(rows), STEP)]
    tokens = 0
    for number in range(WARM_UP + args.steps):
        if number == WARM_UP:
            wall, cpu, tokens = time.perf_counter(), time.process_time(), 0
        step = steps[number % len(steps)]
        ids, labels = batch(step, config.vocab_size)
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        tokens += sum(map(sum, step))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps({
        "rows": args.rows, "sorted": args.sort, "threads": args.threads, "tokens": tokens,
        "per_s": tokens / wall, "per_cpu_s": tokens / cpu,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        "load": os.getloadavg()[0], "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}))


main()
