"""Adapters of every kind, both ways between qlora-train and PEFT, in f32 on the demo's model.

python live.py [SEED]: prints one JSON line; exit 1 where something differs. For each kind PEFT makes
an adapter, both sides train it 8 steps on the same rows (loss, gradient norm), PEFT loads what
qlora-train wrote (logits after each token), and merges it (weights); and for DoRA's odd files
inspect must warn where PEFT computes something else. The programs are taken from the PATH.
"""
import importlib.util
import json
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import warnings

import numpy as np
import peft
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

spec = importlib.util.spec_from_file_location("plain", pathlib.Path(__file__).parents[1] / "peft/live.py")
plain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plain)
warnings.simplefilter("ignore")

STEPS, LR, DECAY, CLIP, RATIO, BATCH = 8, 1e-3, 0.01, 1.0, 4, 4
# Over seeds 1 to 4 the worst relative difference of a loss or norm was 5.8e-7 (2026-11-23), and
# of the merged values at most 1.03e-5 lay on the other side of a rounding to bfloat16: five times
# that is room for another machine's sums. A wrong term shows at 1e-3 and more.
TOLERANCE = 5e-6
PART = 5e-5
# Settings, and how the base is held.
KINDS = {
    "dora": (dict(r=4, lora_alpha=8, target_modules=plain.PROJECTIONS, use_dora=True), "none"),
    "dora-nf4-rslora": (dict(r=4, lora_alpha=8, target_modules=plain.PROJECTIONS, use_dora=True, use_rslora=True), "nf4"),
    "patterns": (dict(r=4, lora_alpha=8, target_modules=["q_proj", "mlp.down_proj", "layers.3.mlp.up_proj"], use_rslora=True,
                      rank_pattern={r"[13]\.self_attn\.q_proj": 2, "q_proj": 6}, alpha_pattern={"down_proj": 3}), "nf4"),
    "regex": (dict(r=4, lora_alpha=8, target_modules=r".*\.[24]\.(self_attn\.(?!k)\w|mlp\.gate)_proj"), "none"),
    "regex-dora": (dict(r=4, lora_alpha=8, target_modules=r".*\.([234])\.(self_attn\.[qv]|mlp\.down)_proj", use_dora=True,
                        rank_pattern={"down_proj": 2}, alpha_pattern={r"3\..*": 5}), "nf4"),
}
OURS = {"r": "rank", "lora_alpha": "alpha"}


def theirs(folder, train, quantization, rates):
    model = peft.PeftModel.from_pretrained(plain.base(quantization), folder, is_trainable=True).train()
    optimiser = create_loraplus_optimizer(model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO, loraplus_weight_decay=DECAY)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [group["lr"] / LR for group in optimiser.param_groups]
    lines = []
    for step, rate in enumerate(rates):
        for group, relative in zip(optimiser.param_groups, groups):
            group["lr"] = relative * rate
        rows = [train[(step * BATCH + i) % len(train)] for i in range(BATCH)]
        tokens = sum(label != -100 for _, labels in rows for label in labels[1:])
        loss = sum(plain.nll(model, *row) for row in rows) / tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP).item()
        optimiser.step()
        optimiser.zero_grad()
        lines.append({"loss": loss.item(), "grad_norm": norm})
    return lines


def tool(*arguments, cwd=None):
    run = subprocess.run(["qlora-train", *map(str, arguments), "--quiet"], cwd=cwd, capture_output=True, text=True)
    return run.returncode, [json.loads(line) for line in run.stdout.splitlines()], run.stderr


def odd(folder, name, good, right, ids, settings, tensors):
    """What differs between PEFT's verdict by doing and inspect's by looking."""
    path = folder / name
    # Without the sums, by which inspect would know of any change.
    shutil.copytree(good, path, ignore=shutil.ignore_patterns("SHA256SUMS"))
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(settings(config)))
    file = path / "adapter_model.safetensors"
    save_file(tensors(load_file(file)), file, {"format": "pt"})
    try:
        with torch.no_grad():
            loaded = peft.PeftModel.from_pretrained(plain.base("none"), path).eval()(input_ids=ids).logits
        wrong = not torch.equal(loaded, right)
    except Exception:
        wrong = True
    code, [report], _ = tool("inspect", path, "--model", plain.MODEL, "--json", "--strict")
    if wrong != bool(report["problems"]) or code != int(wrong):
        return [f"{name}: peft {'wrong' if wrong else 'right'}, inspect says {report['problems']}"]
    return []


def main():
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else random.randrange(10**6)
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(plain.MODEL)
    data = plain.rows(30, seed)
    train = [plain.encode(tokenizer, row) for row in data if row["split"] == "train"]
    worst, logit_difference, failures, merged_off = {}, 0.0, [], 0.0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        (scratch / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
        for name, (settings, quantization) in KINDS.items():
            initial = peft.get_peft_model(plain.base(quantization), peft.LoraConfig(lora_dropout=0.0, task_type="CAUSAL_LM", **settings))
            with torch.no_grad():
                for parameter_name, p in initial.named_parameters():
                    if "lora_B" in parameter_name:
                        torch.nn.init.normal_(p, std=0.02)
                    elif "magnitude" in parameter_name:
                        p.mul_(1 + 0.1 * torch.randn(p.shape))
            initial.save_pretrained(scratch / f"{name}-initial")
            lora = {OURS.get(key, key): value for key, value in settings.items()}
            (scratch / "train.yaml").write_text(json.dumps({
                "lora": {**lora, "dropout": 0, "lr_ratio": RATIO},
                "training": {"max_steps": STEPS, "learning_rate": LR, "warmup_steps": 4, "weight_decay": DECAY, "max_grad_norm": CLIP,
                             "batch_size": BATCH, "gradient_accumulation_steps": 1, "lr_scheduler": "constant", "save_steps": 0, "eval_steps": 0}}))
            code, lines, error = tool("--model", plain.MODEL, "--data", "pairs.jsonl", "--out", name, "--config", "train.yaml", "--quantization",
                                      quantization, "--init-adapter", f"{name}-initial", "--no-shuffle", cwd=scratch)
            assert code == 0, error
            ours = [line for line in lines if "loss" in line]
            reference = theirs(scratch / f"{name}-initial", train, quantization, [line["learning_rate"] for line in ours])
            assert len(ours) == len(reference) == STEPS
            worst[name] = max(abs(mine[key] - other[key]) / other[key] for mine, other in zip(ours, reference) for key in other)
            # What we wrote, read by PEFT, and merged by both; the base is then as it is in the checkpoint.
            ids = train[0][0]
            model = peft.PeftModel.from_pretrained(plain.base("none"), scratch / name).eval()
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0].numpy().ravel()
            logit_difference = max(logit_difference, float(np.abs(plain.run_logits(scratch / name, ids) - logits).max()))
            code, _, error = tool("merge", "--model", plain.MODEL, "--adapter", scratch / name, "--out", scratch / f"{name}-merged", "--no-check")
            assert code == 0, error
            # In f32 and rounded once, as ours; peft would round the base and the change apart.
            merged = model.merge_and_unload().to(torch.bfloat16).state_dict()
            mine = AutoModelForCausalLM.from_pretrained(scratch / f"{name}-merged").state_dict()
            differing = sum((mine[key] != merged[key]).sum().item() for key in merged)
            merged_off = max(merged_off, differing / sum(value.numel() for value in mine.values()))
            code, [report], _ = tool("inspect", scratch / name, "--model", plain.MODEL, "--json", "--strict")
            if code or report["problems"]:
                failures.append(f"{name}: {report['problems']}")

        good, ids = scratch / "dora", torch.tensor([[5, 700, 31, 9, 1200, 44]])
        with torch.no_grad():
            right = peft.PeftModel.from_pretrained(plain.base("none"), good).eval()(input_ids=ids).logits
        asis = lambda value: value
        magnitude = "lora_magnitude_vector"
        for name, settings, tensors in [
            ("as-saved", asis, asis),
            ("not-dora", lambda s: s | {"use_dora": False}, asis),
            ("unset-dora", lambda s: {k: v for k, v in s.items() if k != "use_dora"}, asis),
            ("other-ranks", lambda s: s | {"rank_pattern": {"q_proj": 3}}, asis),
            ("other-alphas", lambda s: s | {"target_modules": s["target_modules"][:5]}, asis),
            ("no-magnitudes", asis, lambda t: {k: v for k, v in t.items() if magnitude not in k}),
            ("one-missing", asis, lambda t: {k: v for k, v in t.items() if "layers.2.mlp.up_proj." + magnitude not in k}),
            ("named", asis, lambda t: {k.replace(magnitude, magnitude + ".replies.weight"): v for k, v in t.items()}),
            ("short", asis, lambda t: {k: v[:-1].clone() if magnitude in k and "q_proj" in k else v for k, v in t.items()}),
            ("pattern-of-all", lambda s: s | {"target_modules": r".*\.\w+_proj"}, asis),
            ("pattern-of-some", lambda s: s | {"target_modules": r".*\.[qkvo]_proj"}, asis),
        ]:
            failures += odd(scratch, "odd-" + name, good, right, ids, settings, tensors)
    passed = not failures and all(value <= TOLERANCE for value in worst.values())
    passed = passed and logit_difference <= plain.LOGIT_TOLERANCE and merged_off <= PART
    print(json.dumps({"check": "adapters", "peft": peft.__version__, "seed": seed, "worst_relative": worst, "logit_difference": logit_difference,
                      "merged_differing": merged_off, "failures": failures, "passed": passed}))
    sys.exit(not passed)


main()
