"""qlora-train and gen-eval against transformers and PEFT, in f32 on the demo's model, and
on a copy of it whose head is its own.

Both sides start from one adapter, take the same rows in the same order and do 20
updates; loss, gradient norm and learning rate of each must agree. Then PEFT loads
what qlora-train wrote and must find the same likelihood of each held-out reply as
gen-eval, and the same logits after each token as qwen3's example `logits`. The
programs are taken from the PATH.
"""
import json
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import peft
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

transformers.logging.set_verbosity_error()
ROOT = pathlib.Path(__file__).parents[3]
MODEL = ROOT / "tests/demo/model"
STEPS, LR, WARMUP, DECAY, CLIP, RANK, ALPHA = 20, 1e-3, 4, 0.01, 1.0, 6, 9
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Over seeds 1 to 3 the worst relative differences in f32 were 2.0e-7 in loss, 9.9e-7
# in gradient norm and 3.2e-7 in likelihood (2026-11-23): five times the worst is room
# for another machine's sums. A wrong term shows at 1e-3 and more.
TOLERANCE = 5e-6
# Two ways of computing these logits in f32 inside torch differ by about 1e-5; ours from
# peft's by 0.95e-5 to 1.43e-5 over seeds 101 to 110 (2026-11-30), mean 1.20e-5, sigma 1.7e-6:
# this is the mean and seven sigma.
LOGIT_TOLERANCE = 2.4e-5
NF4 = np.array([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                0.7229568362236023, 1.0], dtype=np.float32)


def rows(n, seed):
    draw = random.Random(seed)
    things = "tea rain bread maps rivers lamps boats stones clocks gardens".split()
    out = []
    for i in range(n):
        tweet = f"Thoughts on {draw.choice(things)} and {draw.choice(things)}, day {i}?"
        reply = f"I like {draw.choice(things)} " + "a lot " * draw.randrange(5) + draw.choice(["today.", "🙂", "— naïve, no?"])
        split = "eval" if i % 6 == 5 else "train"
        out.append({"id": f"p{i}", "tweet": tweet, "reply": reply, "tweet_normalized": tweet,
                    "reply_normalized": reply, "split": split})
    return out


def encode(tokenizer, row):
    """Ids, and -100 wherever nothing is learnt: all but the reply and <|im_end|>."""
    messages = [{"role": "user", "content": row["tweet"]}, {"role": "assistant", "content": row["reply"]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    start = text.rindex("</think>\n\n") + len("</think>\n\n")
    end = text.rindex("<|im_end|>") + len("<|im_end|>")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = zip(encoded["input_ids"], encoded["offset_mapping"])
    return encoded["input_ids"], [i if start <= a < end else -100 for i, (a, _) in spans]


def nll(model, ids, labels):
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum")


def to_nf4(weight):
    """NF4 with double quantisation and back, by the published definition."""
    code = dynamic_map()
    blocks = weight.numpy().reshape(-1, 64)
    absmax = np.abs(blocks).max(1)
    scaled = np.clip(blocks * (np.float32(1) / absmax)[:, None], -1, 1)
    index = np.searchsorted(((NF4[:-1] + NF4[1:]) / np.float32(2)), scaled)
    offset = np.float32(torch.from_numpy(absmax).mean().item())
    nested = np.zeros(-(-absmax.size // 256) * 256, np.float32)
    nested[: absmax.size] = absmax - offset
    nested = nested.reshape(-1, 256)
    top = np.abs(nested).max(1)
    q = np.searchsorted((code[:-1] + code[1:]) * np.float32(0.5), nested * (np.float32(1) / top)[:, None])
    restored = (code[q] * top[:, None]).reshape(-1)[: absmax.size] + offset
    return torch.from_numpy((NF4[index] * restored[:, None].astype(np.float32)).reshape(weight.shape))


def dynamic_map():
    """The signed dynamic 8-bit map (Dettmers, arXiv 1511.04561), as bitsandbytes lays it out."""
    values = [0.0, 1.0]
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1)
        means = (ends[:-1] + ends[1:]) / 2
        for sign in (1, -1):
            values += (sign * 10.0 ** (i - 6) * means).tolist()
    return np.array(sorted(values), dtype=np.float32)


def untied(folder):
    """The demo's model with an lm_head of its own, a little off the embeddings."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    head = model.lm_head.weight.data
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(head + 0.1 * head.std() * torch.randn(head.shape))
    model.save_pretrained(folder)
    for file in MODEL.glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    shutil.copyfile(MODEL / "chat_template.jinja", folder / "chat_template.jinja")
    return folder


def base(quantization, lm_head="as_stored", source=MODEL):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    if quantization == "nf4":
        for name, module in model.named_modules():
            if name.split(".")[-1] in PROJECTIONS:
                module.weight.data = to_nf4(module.weight.data)
    if lm_head == "nf4":  # a parameter of its own, so that embeddings stay as they are
        model.lm_head.weight = torch.nn.Parameter(to_nf4(model.lm_head.weight.data), requires_grad=False)
    return model


def theirs(folder, train, batch, accumulation, schedule, held, lr_ratio, source):
    model = peft.PeftModel.from_pretrained(base(*held, source), folder, is_trainable=True).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    factors = {"a": [], "b": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factors["b" if "lora_B" in name else "a"].append(parameter)
    groups = [{"params": factors["a"], "lr": LR}, {"params": factors["b"], "lr": LR * lr_ratio}]
    optimiser = torch.optim.AdamW(groups, weight_decay=DECAY)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimiser, num_warmup_steps=WARMUP, num_training_steps=STEPS)
    at, lines = 0, []
    for _ in range(STEPS):
        step = [train[(at + i) % len(train)] for i in range(batch * accumulation)]
        at += len(step)
        tokens = sum(label != -100 for _, labels in step for label in labels[1:])
        total = 0.0
        for ids, labels in step:
            loss = nll(model, ids, labels) / tokens
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP).item()
        lines.append({"loss": total, "grad_norm": norm, "learning_rate": scheduler.get_last_lr()[0]})
        optimiser.step()
        scheduler.step()
        optimiser.zero_grad()
    return lines


def run_logits(adapter, ids):
    run = subprocess.run(["logits", MODEL, adapter], input=json.dumps(ids), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return np.array(json.loads(run.stdout), dtype=np.float32)


def main():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else random.randrange(10**6)
    data = rows(48, seed)
    train = [encode(tokenizer, row) for row in data if row["split"] == "train"]
    worst = {"loss": 0.0, "grad_norm": 0.0, "learning_rate": 0.0, "nll": 0.0}
    logit_difference = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        (scratch / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
        torch.manual_seed(seed)
        for name, rslora in (("initial", False), ("initial-rslora", True)):
            config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=PROJECTIONS,
                                     task_type="CAUSAL_LM", use_rslora=rslora)
            initial = peft.get_peft_model(base("none"), config)
            for parameter_name, parameter in initial.named_parameters():
                if "lora_B" in parameter_name:
                    torch.nn.init.normal_(parameter, std=0.02)
            initial.save_pretrained(scratch / name)
        own_head = untied(scratch / "untied")
        # Base and its head, rows, micro-batches, schedule, rate of B over that of A (LoRA+), scale by the root of
        # the rank, model.
        stored = ("none", "as_stored")
        cases = [(stored, 4, 1, "cosine", 1, False, MODEL), (stored, 2, 3, "linear", 4, True, MODEL),
                 (("nf4", "as_stored"), 3, 2, "constant", 1, True, MODEL), (("nf4", "as_stored"), 5, 1, "cosine", 8, False, MODEL),
                 (("nf4", "nf4"), 4, 1, "linear", 2, False, MODEL),
                 (stored, 3, 2, "cosine", 1, False, own_head), (("nf4", "as_stored"), 4, 1, "linear", 1, False, own_head)]
        for number, (held, batch, accumulation, schedule, lr_ratio, rslora, source) in enumerate(cases):
            initial = "initial-rslora" if rslora else "initial"
            (scratch / "train.yaml").write_text(json.dumps({
                "lora": {"rank": RANK, "alpha": ALPHA, "dropout": 0, "use_rslora": rslora, "lr_ratio": lr_ratio},
                "training": {"max_steps": STEPS, "learning_rate": LR, "warmup_steps": WARMUP, "weight_decay": DECAY,
                             "max_grad_norm": CLIP, "batch_size": batch, "gradient_accumulation_steps": accumulation,
                             "lr_scheduler": schedule, "save_steps": 0, "eval_steps": 0}}))
            out = scratch / f"run{number}"
            command = ["qlora-train", "--model", source, "--data", "pairs.jsonl", "--out", out, "--config", "train.yaml",
                       "--quantization", held[0], "--lm-head", held[1], "--init-adapter", initial, "--no-shuffle", "--quiet"]
            run = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            ours = [line for line in map(json.loads, run.stdout.splitlines()) if "loss" in line]
            reference = theirs(scratch / initial, train, batch, accumulation, schedule, held, lr_ratio, source)
            assert len(ours) == len(reference) == STEPS
            for mine, other in zip(ours, reference):
                for key in other:
                    worst[key] = max(worst[key], abs(mine[key] - other[key]) / max(abs(other[key]), 1e-12))
        # What we wrote, read by PEFT: the likelihood of each held-out reply, over the base as in training.
        (scratch / "eval.yaml").write_text("generation: {max_new_tokens: 2}\n")
        held_out = [encode(tokenizer, row) for row in data if row["split"] == "eval"]
        for number in (1, 4):
            adapter, held = scratch / f"run{number}", cases[number][0]
            command = ["gen-eval", "--model", MODEL, "--adapter", f"lora={adapter}", "--config", "eval.yaml", "--quiet"]
            with open(scratch / "pairs.jsonl") as pairs:
                run = subprocess.run(command, cwd=scratch, stdin=pairs, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            items = [line for line in map(json.loads, run.stdout.splitlines()) if "systems" in line]
            model = peft.PeftModel.from_pretrained(base(*held), adapter).eval()
            assert len(items) == len(held_out) > 0
            with torch.no_grad():
                for item, (ids, labels) in zip(items, held_out):
                    count = sum(label != -100 for label in labels[1:])
                    reference = nll(model, ids, labels).item() / count
                    worst["nll"] = max(worst["nll"], abs(item["systems"]["lora"]["nll"] - reference) / reference)
                    if held == stored:  # as the example has it
                        ours = run_logits(adapter, ids)
                        logits = model(input_ids=torch.tensor([ids])).logits[0].float().numpy().ravel()
                        assert ours.shape == logits.shape
                        logit_difference = max(logit_difference, float(np.abs(ours - logits).max()))
    passed = all(value <= TOLERANCE for value in worst.values()) and logit_difference <= LOGIT_TOLERANCE
    print(json.dumps({"check": "peft", "peft": peft.__version__, "transformers": transformers.__version__,
                      "torch": re.sub(r"\+.*", "", torch.__version__), "seed": seed, "worst_relative": worst, "logit_difference": logit_difference, "passed": passed}))
    sys.exit(not passed)


if __name__ == "__main__":
    main()
