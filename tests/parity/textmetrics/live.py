"""gen-eval --score-only against rouge-score and sacrebleu, on fresh strings.

python live.py [PREDICTIONS.jsonl] [SEED]: prints one JSON line; exit 1 where a
figure differs in the 4th decimal. With a file, its {"prediction","reference"} lines
are compared instead of generated ones. gen-eval is taken from the PATH.
"""
import json
import subprocess
import sys
import time

from cases import cases
from reference import VERSIONS, corpus, item

DECIMALS = 4
files = [argument for argument in sys.argv[1:] if not argument.isdigit()]
seed = next((int(argument) for argument in sys.argv[1:] if argument.isdigit()), int(time.time()))
if files:
    with open(files[0], encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    pairs = [(row["prediction"], row["reference"]) for row in rows if "prediction" in row]
else:
    pairs = cases(1000, seed)

lines = "".join(json.dumps({"prediction": p, "reference": r}) + "\n" for p, r in pairs)
run = subprocess.run(["gen-eval", "--score-only"], input=lines.encode(), capture_output=True, check=True)
*ours, last = [json.loads(line) for line in run.stdout.decode().split("\n") if line]
assert len(ours) == len(pairs), (len(ours), len(pairs))

worst, compared, differing = 0.0, 0, []


def compare(mine, theirs, what):
    global worst, compared
    compared += 1
    worst = max(worst, abs(mine - theirs))
    if abs(mine - theirs) >= 0.5 * 10**-DECIMALS:
        differing.append({"figure": what, "ours": mine, "theirs": theirs})


for (prediction, reference), mine in zip(pairs, ours):
    theirs = item(prediction, reference)
    for figure in ("rouge1", "rouge2", "rougeL"):
        compare(mine[figure], theirs[figure][2], [figure, prediction, reference])
    for figure in ("bleu", "chrf"):
        compare(mine[figure], theirs[figure], [figure, prediction, reference])
theirs = corpus(pairs)
for figure in ("bleu", "chrf", "chrf++", "distinct_1", "distinct_2"):
    compare(last["corpus"][figure], theirs[figure], figure)

print(json.dumps({"check": "textmetrics", **VERSIONS, "pairs": len(pairs), "seed": None if files else seed, "figures": compared,
                  "largest_difference": worst, "differing": differing[:5]}))
sys.exit(bool(differing))
