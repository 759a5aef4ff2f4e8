"""qlora-train merge and inspect against peft and transformers.

python live.py [SEED]: prints one JSON line; exit 1 where something differs. On the demo's
model and a random adapter: merged weights against merge_and_unload, inspect --verify with
this Python, and for every odd adapter whether inspect warns where peft computes something
else (or fails). qlora-train is taken from the PATH.
"""
import json
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

# Sums of four products in another order land on the other side of a rounding to
# bfloat16: over three seeds in 2 to 5 of 1,263,296 values. PART is five times that.
PART = 2e-5
MODEL = Path(__file__).parents[2] / "demo/model"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
warnings.simplefilter("ignore")
torch.manual_seed(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
ids = torch.tensor([[5, 700, 31, 9, 1200, 44]])


def base(dtype=torch.bfloat16):
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)


def run(*arguments):
    done = subprocess.run(["qlora-train", *map(str, arguments), "--quiet"], capture_output=True, text=True)
    return done.returncode, json.loads(done.stdout) if done.stdout else done.stderr


failures = []
with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    adapted = peft.get_peft_model(base(torch.float32), peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=TARGETS, task_type="CAUSAL_LM")).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.uniform_(parameter, -0.05, 0.05)
    adapted.save_pretrained(folder / "good")
    with torch.no_grad():
        right = adapted(input_ids=ids).logits

    run("merge", "--adapter", folder / "good", "--out", folder / "merged")
    theirs = peft.PeftModel.from_pretrained(base(), folder / "good").merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(folder / "merged").state_dict()
    assert ours.keys() == theirs.keys()
    differing = sum((ours[k] != theirs[k]).sum().item() for k in ours)
    total = sum(v.numel() for v in load_file(folder / "merged/model.safetensors").values())
    if differing > PART * total:
        failures.append(f"{differing} of {total} merged values differ")

    for what in (MODEL, folder / "good"):
        code, verified = run("inspect", what, "--verify", "--python", sys.executable, "--json", "--strict")
        if code or not verified["verified"]["agrees"]:
            failures.append(f"--verify: {verified}")

    def odd(name, settings=lambda s: s, tensors=lambda t: t):
        """Whether peft computes something else, or fails, and what inspect says."""
        path = folder / name
        shutil.copytree(folder / "good", path)
        (path / "adapter_config.json").write_text(json.dumps(settings(json.loads((path / "adapter_config.json").read_text()))))
        save_file(tensors(load_file(path / "adapter_model.safetensors")), path / "adapter_model.safetensors", {"format": "pt"})
        try:
            with torch.no_grad():
                loaded = peft.PeftModel.from_pretrained(base(torch.float32), path).eval()(input_ids=ids).logits
            wrong = not torch.equal(loaded, right)
        except Exception:
            wrong = True
        code, report = run("inspect", path, "--model", MODEL, "--json", "--strict")
        if wrong != bool(report["problems"]) or code != int(wrong):
            failures.append(f"{name}: peft {'wrong' if wrong else 'right'}, inspect says {report['problems']}")

    def without(key):
        return lambda settings: {k: v for k, v in settings.items() if k != key}

    odd("as-saved")
    odd("no-dropout", without("lora_dropout"))
    odd("no-revision", without("revision"))
    for key in ("r", "lora_alpha", "target_modules", "peft_type"):
        odd(f"no-{key}", without(key))
    odd("other-rank", lambda s: s | {"r": 3})
    odd("fewer-targets", lambda s: s | {"target_modules": TARGETS[:3]})
    odd("one-layer", lambda s: s | {"layers_to_transform": [0]})
    odd("excluded", lambda s: s | {"exclude_modules": ["up_proj"]})
    odd("no-prefix", tensors=lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()})
    odd("named-default", tensors=lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()})
    odd("named", tensors=lambda t: {k.replace(".weight", ".replies.weight"): v for k, v in t.items()})
    odd("one-missing", tensors=lambda t: {k: v for k, v in t.items() if "layers.2.mlp.up_proj.lora_B" not in k})
    odd("one-not-finite", tensors=lambda t: {k: v / 0 if "layers.2.mlp.up_proj.lora_B" in k else v for k, v in t.items()})

print(json.dumps({"check": "merge", "differing": differing, "of": total, "failures": failures}))
sys.exit(bool(failures))
