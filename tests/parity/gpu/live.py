"""tests/gpu/bench as it is used: copied with the binary into an empty folder, and nothing else.

python live.py: a dry run at a tiny shape, on the processor, in two calls that share a
folder; prints one JSON line, exit 1 where a line of the table is missing, a part failed,
or the second call measured anything again. Then that a part which failed is a line and exit
1, whatever it had measured, and so is one whose binary writes nonsense; and that rows shorter
than a tokenizer makes them are counted as they are. No speed is judged. qlora-train is taken
from the PATH.
"""
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

BENCH = pathlib.Path(__file__).parents[2] / "gpu/bench"
# What stands in the lines that the dry run fills, by figure; and what is right or wrong there.
LINES = {
    "1": ["nothing recomputed", "all recomputed"],
    "2": ["at its best; peft: ", "training, 4 rows a step; peft: ", "training, 16 rows a step; peft: ", "at its best; Unsloth"],
    "3": ["bf16 head, f32 moments", "bf16 head, 8-bit moments", "NF4 head, 8-bit moments"],
    "4": ["adapter, first", "adapter, again"],
    "5": ["2 × 2 tokens", "at its best; transformers: "],
    "6": ["growth of memory over 20 steps", "killed at step 25", "loss over 50 steps"],
    "7": ["training, 4 rows a step; peft: ", "training, 16 rows a step; peft: ", "command to adapter", "its tokens"],
}
MET = ["killed at step 25", "loss over 50 steps", "its tokens"]


# As the program, but for what it writes.
BROKEN = """#!/bin/sh
case "$*" in
*--print-lengths*) exec "${0%/*}/qlora-train" "$@";;
*--recompute*) echo '{"device": "CPU", "figure": "train", "steps": 9, "losses": [6.9, null]}';;
*) echo '{"device": "CPU", "figure": "train", "steps": 9, "losses": [6.9, 6.8]}';;
esac
echo no record
"""


def failing(folder, run):
    """What is wrong with calls that go wrong, or must not."""
    figures = folder / "work/figures.jsonl"
    records = [json.loads(line) for line in figures.read_text().splitlines()]
    failed = [r | {"outcome": "exit 101"} if r["part"] == "ours/recompute" and "outcome" in r else r for r in records]
    figures.write_text("\n".join([*map(json.dumps, failed), "no record", ""]))
    (folder / "broken").write_text(BROKEN)
    (folder / "broken").chmod(0o755)
    (folder / "short.json").write_text(json.dumps([[1, 1], [13, 2], [5, 9]]))
    for arguments, status, needed in [
            (["--work", "work", "--show"], 1, ["failed: ours/recompute  ", "records, shown above: exit 101", "all recomputed  "]),
            (["--work", "work", "--show", "--shape", "qwen3-0.6b"], 0, ["all recomputed  "]),
            (["--work", "new", "--alone", "--only", "1", "--binary", "broken"], 1,
             ["failed: ours/all kept  ", "nothing was learnt", "throughput: a record is not"]),
            (["--work", "short", "--records", "short.jsonl", "--alone", "--only", "7", "--lengths", "short.json"], 0, ["its tokens"])]:
        done = run(arguments)
        lines = [[line for line in done.stdout.splitlines() if words in line] for words in needed]
        if done.returncode != status or not all(lines) or "Traceback" in done.stderr:
            yield f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        if "qwen3-0.6b" in arguments and not all("not run yet" in line for line in lines[0]):
            yield f"{arguments}: another shape's: {lines}"


def main():
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(BENCH, folder)
        shutil.copy(shutil.which("qlora-train"), folder)
        command = [sys.executable, "bench", "--binary", "qlora-train", "--shape", "tiny", "--device", "cpu", "--work", "work",
                   "--steps", "1", "--prompts", "2", "--new-tokens", "2"]

        def run(more):
            return subprocess.run([*command, *more], cwd=folder, capture_output=True, text=True)

        first, second, third = map(run, [["--only", "1,3,4,6"], [], []])
        failures = list(failing(pathlib.Path(folder), run))
    table = third.stdout.splitlines()
    wrong = failures + [f"{run.args}: {run.returncode}\n{run.stderr}" for run in (first, second, third) if run.returncode]
    for figure, needed in LINES.items():
        for words in needed:
            lines = [line for line in table if line.startswith(f"{figure}  ") and words in line]
            if not lines or any("fail" in line or "not run yet" in line for line in lines):
                wrong.append(f"{figure}: {words!r}: {lines}")
            if words in MET and not all(line.endswith("  met") for line in lines):
                wrong.append(f"{lines}: not met")
    wrong += [f"too wide: {line}" for line in table if len(line) > 120]
    again = [line for line in (second.stderr + third.stderr).splitlines() if ": done (" in line]
    if third.stderr or any(line.startswith("ours/killed") for line in again):
        wrong.append(f"measured again: {again}")
    print(json.dumps({"check": "gpu", "lines": len(table), "passed": not wrong} | ({"wrong": wrong} if wrong else {})))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
