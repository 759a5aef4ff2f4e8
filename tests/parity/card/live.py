"""The Python that a model card shows, run in the adapter's folder by peft.

python live.py: trains two steps on the demo's model, takes the code out of the card,
runs it, and compares its reply with gen-eval's greedy one; prints one JSON line, exit 1
where they differ. qlora-train and gen-eval are taken from the PATH.
"""
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = Path(__file__).parents[2] / "demo/model"
TWEET, SYSTEM = "the tweet", 'Say "hm" first.\nThen be brief.'
ROWS = [("Anyone up?", "Every day!"), ("Rain again", "Good for the garden 🌱"), ("Monday", "No")]
ASKED = {"id": "asked", "tweet": TWEET, "reply": "Yes"}  # gen-eval takes no row that was trained on
SETTINGS = {
    "model": {"path": "models/demo", "quantization": "none"}, "lora": {"rank": 4},
    "training": {"max_steps": 2, "batch_size": 3, "gradient_accumulation_steps": 1, "learning_rate": 0.02, "warmup_steps": 0},
    "data": {"text": "raw", "system_prompt": SYSTEM},
}

with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    rows = [json.dumps({"id": f"p{i}", "tweet": t, "reply": r}) for i, (t, r) in enumerate(ROWS)]
    (folder / "pairs.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "models").mkdir()
    (folder / "models/demo").symlink_to(MODEL)  # the base's path is relative, as by default
    (folder / "train.yaml").write_text(json.dumps(SETTINGS))
    train = ["qlora-train", "--quiet", "--config", "train.yaml", "--data", "pairs.jsonl", "--out", "out", "--device", "cpu"]
    subprocess.run(train, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    card = (folder / "out/README.md").read_text()
    script = re.search(r"```python\n(.*?)\n```", card, re.S)[1]
    # A model's own generation_config may sample, and bfloat16 breaks near ties otherwise.
    exact = script
    for shown, taken in [("max_new_tokens=96", "max_new_tokens=96, do_sample=False"), ('dtype="auto"', 'dtype="float32"')]:
        assert shown in exact
        exact = exact.replace(shown, taken)
    run = subprocess.run([sys.executable, "-c", exact], cwd=folder / "out", capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{script}\n{run.stderr}")
    ours = subprocess.run(["gen-eval", "--quiet", "--adapter", "out", "--device", "cpu", "--max-new-tokens", "96"], cwd=folder,
                          input=json.dumps(ASKED) + "\n", capture_output=True, text=True, check=True).stdout
reply = json.loads(ours.splitlines()[0])["systems"]["lora"]["prediction"]
same = run.stdout.strip() == reply
print(json.dumps({"check": "card", "same": same, "reply": reply} | ({} if same else {"peft": run.stdout.strip()}), ensure_ascii=False))
sys.exit(0 if same else 1)
