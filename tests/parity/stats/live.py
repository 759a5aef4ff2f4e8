"""sigtest against scipy and statsmodels, on fresh samples.

python live.py [SEED]: prints one JSON line; exit 1 where a closed form differs by
more than one part in 10^9, or a resampled p-value by more than five of its own
standard errors. sigtest is taken from the PATH.
"""
import json
import math
import subprocess
import sys
import time
import warnings

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

warnings.simplefilter("ignore")
RESAMPLES, TOLERANCE, SIGMAS = 20_000, 1e-9, 5
seed = int(sys.argv[1]) if len(sys.argv) > 1 else int(time.time())
rng = np.random.default_rng(seed)
worst, compared, differing = 0.0, 0, []


def compare(mine, theirs, what):
    global worst, compared
    compared += 1
    difference = abs(mine - theirs) / max(abs(theirs), 1e-300)
    worst = max(worst, difference)
    if difference > TOLERANCE:
        differing.append({"figure": what, "ours": mine, "theirs": theirs})


for trial in range(36):
    n = int(rng.integers(3, 120))
    kind = trial % 3  # reals, whole numbers with ties and zeros, 0 and 1
    draw = (lambda: rng.normal(size=n) + rng.normal() * 0.3, lambda: rng.integers(0, 5, n) * 1.0, lambda: (rng.random(n) < 0.6) * 1.0)[kind]
    metrics = {f"m{i}": (draw(), draw()) for i in range(3)}
    rows = "".join(json.dumps({side: {m: pair[i][row] for m, pair in metrics.items()} for i, side in enumerate("ab")}) + "\n" for row in range(n))
    alternative = ("two-sided", "greater", "less")[trial // 3 % 3]
    run = subprocess.run(["sigtest", "--a=a", "--b=b", f"--alternative={alternative}", f"--resamples={RESAMPLES}", f"--seed={trial}"],
                         input=rows.encode(), capture_output=True, check=True)
    lines = {(line["metric"], line["test"]): line for line in map(json.loads, run.stdout.splitlines())}
    p_values = {}
    for metric, (a, b) in metrics.items():
        d = a - b
        if not d.any() or d.std() < 1e-12:
            continue
        t = stats.ttest_rel(a, b, alternative=alternative)
        w = stats.wilcoxon(a, b, alternative=alternative)
        s = stats.binomtest(int((d > 0).sum()), int((d != 0).sum()), alternative=alternative)
        for test, statistic, p in (("paired_t", t.statistic, t.pvalue), ("wilcoxon", w.statistic, w.pvalue), ("sign", None, s.pvalue)):
            line = lines[metric, test]
            what = [trial, metric, test, n, alternative]
            if statistic is not None:
                compare(line["statistic"], float(statistic), what)
            compare(line["p"], float(p), what)
            p_values.setdefault(test, []).append((metric, float(p)))
        line = lines[metric, "permutation"]
        total = lambda x, axis: x.sum(axis)
        p = stats.permutation_test((d,), total, permutation_type="samples", vectorized=True, alternative=alternative,
                                   n_resamples=RESAMPLES, rng=rng).pvalue
        # scipy doubles the smaller tail, sigtest counts |difference|: the same p, another error.
        tails = 2 if alternative == "two-sided" else 1
        error = math.sqrt((p * (1 - p) + tails * p * (1 - p / tails)) / RESAMPLES) + 2 / RESAMPLES
        compared += 1
        if abs(line["p"] - p) > SIGMAS * error:
            differing.append({"figure": [trial, metric, "permutation"], "ours": line["p"], "theirs": p})
    for test, family in p_values.items():
        adjusted = multipletests([p for _, p in family], method="holm")[1]
        for (metric, _), p in zip(family, adjusted):
            compare(lines[metric, test]["p_holm"], float(p), [trial, metric, test, "holm"])

print(json.dumps({"check": "stats", "scipy": __import__("scipy").__version__, "seed": seed, "figures": compared,
                  "largest_relative_difference": worst, "differing": differing[:5]}))
sys.exit(bool(differing))
