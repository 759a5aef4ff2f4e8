"""What the W&B client and track send for the same lines, brought into one form."""
import json
import os
import subprocess
import sys
import tempfile

from recorder import Recorder

KEY = "a" * 40
# Two figures of one step come in two lines, as those of an update and of an evaluation do.
LINES = [
    {"step": 0, "eval_loss": 2.5},
    {"step": 1, "loss": 2.25, "learning_rate": 0.0001, "tokens": 812},
    {"step": 2, "loss": 2.0, "tokens": 790},
    {"step": 2, "eval_loss": 1.9},
    {"step": 4, "loss": 1.5},
]
SETTINGS = {"training.seed": 42, "lora.rank": 8, "lora.target_modules": ["q_proj", "v_proj"], "data.system_prompt": "", "model.path": "x"}

CLIENT = """
import json, sys, wandb
lines, settings = json.load(sys.stdin)
quiet = wandb.Settings(x_disable_stats=True, x_disable_meta=True, console="off", save_code=False, disable_git=True, silent=True)
run = wandb.init(entity="me", project="tweets", id="abcd1234", name="main", config=settings, settings=quiet)
for line in lines:
    run.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])
run.finish()
"""


def of_client():
    with Recorder() as recorder, tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"WANDB_BASE_URL": f"http://{recorder.host}", "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}
        subprocess.run([sys.executable, "-c", CLIENT], input=json.dumps([LINES, SETTINGS]), text=True, cwd=folder, env=env, check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)
        return recorder.requests


def of_track():
    with Recorder() as recorder, tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"WANDB_BASE_URL": f"http://{recorder.host}", "WANDB_API_KEY": KEY}
        with open(f"{folder}/settings.yaml", "w", encoding="utf-8") as file:
            json.dump(SETTINGS, file)
        subprocess.run(["track", "--quiet", "--to", "wandb=me/tweets", "--send-key-to", recorder.host, "--name", "main", "--state", "state",
                        "--settings", "settings.yaml"], input="".join(json.dumps(line) + "\n" for line in LINES), text=True, cwd=folder,
                       env=env, check=True, stdout=subprocess.DEVNULL, timeout=120)
        return recorder.requests


def form(requests):
    """The run as the service is left with it: paths, secret, settings, rows by their offsets, the last summary, the end. Ids and times
    are their kinds."""
    shape = {"authorization": set(), "graphql": set(), "paths": set(), "rows": {}, "summary": None, "end": None, "run": {}}
    for request in requests:
        body, path = request["body"], request["path"]
        if path.endswith("/graphql") and "upsertBucket" in body["query"]:
            given = body["variables"]
            name = given["name"]
            shape["graphql"].add(path)
            config = json.loads(given["config"] or "{}")
            config.pop("_wandb", None)  # the client's own telemetry
            told = {"project": given["project"], "entity": given["entity"], "displayName": given["displayName"], "config": config}
            shape["run"] |= {key: value for key, value in told.items() if value}
        elif path.endswith("/file_stream"):
            shape["paths"].add(path.replace(name, "RUN"))
            for file, part in body.get("files", {}).items():
                rows = [json.loads(row) for row in part["content"]]
                for row in rows:
                    row.pop("_wandb", None)
                    for key in ("_timestamp", "_runtime"):
                        if key in row:
                            assert isinstance(row[key], (int, float)), row
                            row[key] = "seconds since 1970" if row[key] > 1e9 else "seconds"
                if file == "wandb-history.jsonl":
                    shape["rows"] |= {str(part["offset"] + at): row for at, row in enumerate(rows)}
                elif file == "wandb-summary.json":
                    assert part["offset"] == 0, part
                    shape["summary"] = rows[-1]
            if body.get("complete"):
                shape["end"] = {"complete": body["complete"], "exitcode": body["exitcode"]}
        else:
            continue
        shape["authorization"].add(request["authorization"])
    return {key: sorted(value) if isinstance(value, set) else value for key, value in shape.items()}
