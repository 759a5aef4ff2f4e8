"""tests/gpu/bench as it is used: copied with the binary into an empty folder, and nothing else.

python live.py: a dry run at a tiny shape, on the processor, in two calls that share a
folder; prints one JSON line, exit 1 where a line of the table is missing, a part failed,
or the second call measured anything again. No speed is judged. qlora-train is taken from
the PATH.
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


def main():
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(BENCH, folder)
        shutil.copy(shutil.which("qlora-train"), folder)
        command = [sys.executable, "bench", "--binary", "qlora-train", "--shape", "tiny", "--device", "cpu", "--work", "work",
                   "--steps", "1", "--prompts", "2", "--new-tokens", "2"]
        first, second = (subprocess.run([*command, *more], cwd=folder, capture_output=True, text=True)
                         for more in (["--only", "1,3,4,6"], []))
        third = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    table = third.stdout.splitlines()
    wrong = [f"{run.args}: {run.returncode}\n{run.stderr}" for run in (first, second, third) if run.returncode]
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
