"""Writes cases.jsonl and provenance.json here: python dump.py YYYY-MM-DD

A line per pair, then a line per slice of the pairs scored as a corpus. Read by
tools/lib/textmetrics/tests/parity.rs.
"""
import hashlib
import json
import sys
from pathlib import Path

from cases import cases
from reference import VERSIONS, corpus, item

HERE = Path(__file__).parent
PAIRS, SEED = 360, 20261123
# Slices too short for four orders, and ones with empty predictions, besides all of it.
SLICES = [(0, PAIRS), (0, 5), (5, 26), (26, 60), (60, 61), (100, 250)]

pairs = cases(PAIRS, SEED)
lines = [{"prediction": p, "reference": r, "expected": item(p, r)} for p, r in pairs]
lines += [{"slice": [a, b], "expected": corpus(pairs[a:b])} for a, b in SLICES]
data = "".join(json.dumps(line) + "\n" for line in lines).encode()
(HERE / "cases.jsonl").write_bytes(data)
provenance = {
    "script": "dump.py", "date": sys.argv[1], "python": sys.version.split()[0], **VERSIONS,
    "pairs": PAIRS, "seed": SEED, "sha256": {"cases.jsonl": hashlib.sha256(data).hexdigest()},
}
(HERE / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")
