"""Writes cases.jsonl and provenance.json here: python dump.py YYYY-MM-DD

Each line is one paired sample, made from a seed, with what scipy and statsmodels
say of it; the last line is a family of samples for Holm's adjustment. Figures that
depend on random resamples come as mean and standard deviation over REPEATS runs
of scipy, so that a reader can tell error from luck. Read by tests/sigtest.rs.
"""
import hashlib
import json
import math
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

warnings.simplefilter("ignore")
HERE = Path(__file__).parent
SEED, REPEATS, RESAMPLES = 20261123, 40, 10_000
KINDS = ("two-sided", "greater", "less")
rng = np.random.default_rng(SEED)


def number(x):
    return float(x) if x is not None and math.isfinite(x) else None


def samples():
    """name, a, b, clusters or None"""
    normal = lambda n, shift, spread: (lambda a: (a, a - rng.normal(shift, spread, n)))(rng.normal(3, 1, n))
    yield "two rows", *normal(2, 0.2, 1), None
    yield "five rows", *normal(5, 0.3, 1), None
    yield "twelve rows", *normal(12, 0.5, 1), None
    yield "twelve whole numbers, ties and zeros", *(rng.integers(0, 4, (2, 12)).astype(float)), None
    yield "thirteen rows, one zero", *(lambda a, b: (a, np.where(np.arange(13) == 4, a, b)))(*normal(13, 0.4, 1)), None
    yield "thirty whole numbers, ties and zeros", *(rng.integers(0, 6, (2, 30)).astype(float)), None
    yield "forty rows, no ties", *normal(40, 0.25, 1), None
    yield "fifty rows, no ties", *normal(50, -0.3, 1), None
    yield "fifty-one rows, no ties", *normal(51, 0.3, 1), None
    yield "two hundred skewed", *(rng.exponential(1, (2, 200)) * [[1.15], [1]]), None
    yield "three hundred, far apart", *normal(300, 1.5, 1), None
    yield "no effect", *normal(80, 0, 1), None
    yield "forty of 0 and 1", *(rng.random((2, 40)) < [[0.7], [0.4]]).astype(float), None
    yield "six of 0 and 1", np.array([1.0, 1, 1, 0, 1, 1]), np.array([0.0, 0, 0, 0, 0, 1]), None
    yield "huge and tiny", *(rng.normal(0, 1, (2, 25)) * 1e-7 + [[1e3 + 1e-7], [1e3]]), None
    for name, groups, size in (("eleven clusters", 11, 4), ("sixty clusters", 60, 5)):
        label = np.repeat(np.arange(groups), rng.integers(1, size + 1, groups))
        a = rng.normal(3, 1, len(label)) + rng.normal(0.2, 0.5, groups)[label]
        yield name, a, rng.normal(3, 1, len(label)), label


def spread(run):
    """Mean and standard deviation of a figure over runs with other seeds."""
    runs = np.array([run(np.random.default_rng(SEED + i)) for i in range(REPEATS)])
    return {"mean": runs.mean(0).tolist(), "sd": runs.std(0, ddof=1).tolist()}


def bootstrap(sums, rows, alternative):
    ratio = lambda s, r, axis: s.sum(axis) / r.sum(axis)

    def run(generator):
        interval = stats.bootstrap((sums, rows), ratio, paired=True, vectorized=True, method="BCa", alternative=alternative,
                                   n_resamples=RESAMPLES, rng=generator).confidence_interval
        return [end for end in interval if math.isfinite(end)]

    return spread(run)


def permutation(sums, alternative):
    total = lambda s, axis: s.sum(axis)
    test = lambda generator: stats.permutation_test((sums,), total, permutation_type="samples", vectorized=True, alternative=alternative,
                                                    n_resamples=RESAMPLES, rng=generator).pvalue
    if 2 ** len(sums) <= RESAMPLES:
        return {"exact": test(None)}
    return spread(lambda generator: [test(generator)])


def effects(a, b, d):
    correction = lambda m: math.exp(math.lgamma(m / 2) - math.lgamma((m - 1) / 2)) / math.sqrt(m / 2)
    average = math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    over = np.sign(a[:, None] - b[None]).sum()
    unequal = d[d != 0]
    ranks = stats.rankdata(abs(unequal))
    return {
        "d_z": number(d.mean() / d.std(ddof=1)),
        "hedges_g_av": number(d.mean() / average * correction(2 * len(d) - 2)),
        "cliffs_delta": over / len(d) ** 2,
        "rank_biserial": (ranks * np.sign(unequal)).sum() / ranks.sum(),
        "share_a_greater": ((d > 0).sum() + 0.5 * (d == 0).sum()) / len(d),
    }


def expect(a, b, clusters, alternative):
    d = a - b
    greater, less = int((d > 0).sum()), int((d < 0).sum())
    out = {}
    if clusters is None:
        t = stats.ttest_rel(a, b, alternative=alternative)
        interval = t.confidence_interval(0.95)
        out["paired_t"] = {"statistic": t.statistic, "p": t.pvalue, "ci": [number(interval.low), number(interval.high)]}
        w = stats.wilcoxon(a, b, alternative=alternative)
        out["wilcoxon"] = {"statistic": w.statistic, "p": w.pvalue}
        s = stats.binomtest(greater, greater + less, alternative=alternative)
        wilson = s.proportion_ci(0.95, "wilson")
        out["sign"] = {"statistic": greater, "p": s.pvalue, "ci": list(wilson)}
        if set(np.r_[a, b]) <= {0.0, 1.0}:
            table = [[int(((a == i) & (b == j)).sum()) for j in (1, 0)] for i in (1, 0)]
            m = mcnemar(table, exact=True)
            out["mcnemar"] = {"statistic": m.statistic, "p": m.pvalue if alternative == "two-sided" else s.pvalue}
        sums, rows = d, np.ones(len(d))
    else:
        fit = sm.OLS(d, np.ones(len(d))).fit(cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True)
        t, df = fit.tvalues[0], len(set(clusters)) - 1
        p = {"two-sided": 2 * stats.t.sf(abs(t), df), "greater": stats.t.sf(t, df), "less": stats.t.cdf(t, df)}[alternative]
        assert alternative != "two-sided" or math.isclose(p, fit.pvalues[0])
        low, high = fit.conf_int(0.05 if alternative == "two-sided" else 0.1)[0]
        out["paired_t"] = {"statistic": t, "p": p, "ci": [None if alternative == "less" else low, None if alternative == "greater" else high]}
        sums = np.array([d[clusters == c].sum() for c in np.unique(clusters)])
        rows = np.array([(clusters == c).sum() for c in np.unique(clusters)], float)
    out["permutation"] = permutation(sums, alternative)
    if len(sums) > 2:
        out["bootstrap"] = bootstrap(sums, rows, alternative)
    return out


lines = []
for name, a, b, clusters in samples():
    lines.append({
        "name": name, "a": a.tolist(), "b": b.tolist(), "clusters": None if clusters is None else clusters.tolist(),
        "effects": effects(a, b, a - b), "expected": {kind: expect(a, b, clusters, kind) for kind in KINDS},
    })
family = {f"m{i}": rng.normal(0, 1, (2, 25)) + [[0.1 * i], [0]] for i in range(8)}
adjusted = {
    test: multipletests([f(*pair).pvalue for pair in family.values()], method="holm")[1].tolist()
    for test, f in (("paired_t", stats.ttest_rel), ("wilcoxon", stats.wilcoxon))
}
lines.append({"family": {name: pair.tolist() for name, pair in family.items()}, "holm": adjusted})

data = "".join(json.dumps(line, default=lambda x: x.item()) + "\n" for line in lines).encode()
(HERE / "cases.jsonl").write_bytes(data)
provenance = {
    "script": "dump.py", "date": sys.argv[1], "python": sys.version.split()[0],
    **{p: version(p) for p in ("numpy", "scipy", "statsmodels")},
    "seed": SEED, "resamples": RESAMPLES, "repeats": REPEATS, "sha256": {"cases.jsonl": hashlib.sha256(data).hexdigest()},
}
(HERE / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")
