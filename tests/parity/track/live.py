"""track against TensorBoard's own reader, and against what the W&B client sends.

python live.py [SEED]: prints one JSON line, exit 1 where anything differs. track is taken
from the PATH; the W&B client talks to a local stand-in. MLflow has a check of its own, see
`mlflow` beside this file.
"""
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from client import form, of_client, of_track

seed = int(sys.argv[1]) if sys.argv[1:] else int(time.time())
draw = random.Random(seed)
lines = [{"step": 0, "eval_loss": 3.25, "eval_tokens": 911}]
for step in range(1, 401):
    lines.append({"step": step, "loss": 3 * math.exp(-step / 80) + draw.random(), "learning_rate": draw.random() * 2e-4, "grad_norm": draw.lognormvariate(0, 9),
                  "tokens": draw.randrange(10**6)})
    if step % 50 == 0:
        lines.append({"step": step, "eval_loss": draw.random(), "eval_tokens": 911})
wanted = {}
for line in lines:
    for name, value in line.items():
        if name != "step":
            wanted.setdefault(name, []).append((line["step"], float(np.float32(value))))

with tempfile.TemporaryDirectory() as folder:
    def send(part):
        text = "".join(json.dumps(line) + "\n" for line in part)
        subprocess.run(["track", "--quiet", "--to", f"tensorboard={folder}/run", "--settings", f"{folder}/run.json"], input=text, text=True, check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    with open(f"{folder}/run.json", "w", encoding="utf-8") as file:
        json.dump({"v": 1, "settings": ['model.quantization = "nf4"', "lora.rank = 16"], "device": "cpu"}, file)
    # Stopped at 250, gone on from the checkpoint at 200, and all of it again.
    for part in (lines[:256], lines[205:], lines):
        send(part)
    events = EventAccumulator(f"{folder}/run", size_guidance={"scalars": 0, "tensors": 0}).Reload()
    got = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    text = events.Tensors("settings")[0].tensor_proto.string_val[0].decode()

theirs, ours = form(of_client()), form(of_track())
failed = [what for what, right in {
    "tensorboard: values and steps": got == wanted,
    "tensorboard: settings": "| lora.rank | 16 |" in text and "| run.device | cpu |" in text,
    "wandb: what is sent": theirs == ours,
}.items() if not right]
print(json.dumps({"check": "track", "tensorboard": version("tensorboard"), "wandb": version("wandb"), "seed": seed,
                  "points": sum(map(len, wanted.values())), "failed": failed} | ({"client": theirs, "track": ours} if theirs != ours else {})))
sys.exit(bool(failed))
