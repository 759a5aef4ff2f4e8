"""track against a real MLflow server, read back by MLflow's own client. See `mlflow`."""
import datetime
import hashlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

from client import LINES, SETTINGS

HERE = Path(__file__).parent


class Proxy(BaseHTTPRequestHandler):
    """Hands requests on and keeps them with their answers."""

    behind, kept, cut = None, [], 0

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        request = urllib.request.Request(self.behind + self.path, data=body or None, headers={"content-type": "application/json"}, method=self.command)
        try:
            with urllib.request.urlopen(request) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        self.kept.append({"method": self.command, "path": self.path, "body": json.loads(body) if body else None,
                          "status": status, "answer": json.loads(text)})
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        if Proxy.cut > 0 and self.command == "POST":
            Proxy.cut -= 1
            text = text[:-1]  # it arrived, and nobody hears of it
        self.wfile.write(text)

    do_GET = do_POST = handle_any

    def log_message(self, *_):
        pass


def track(address, folder, lines, *more):
    with open(f"{folder}/settings.yaml", "w", encoding="utf-8") as file:
        json.dump(SETTINGS, file)
    command = ["track", "--quiet", "--to", f"mlflow={address}", "--state", f"{folder}/state", "--settings", f"{folder}/settings.yaml", *more]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    return subprocess.run(command, input=text, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def history(client, experiment):
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    assert len(runs) == 1, runs
    run = runs[0]
    metrics = {name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics}
    return run, metrics


def wanted(lines):
    all_of = {}
    for line in lines:
        for name, value in line.items():
            if name != "step":
                all_of.setdefault(name, []).append((line["step"], float(value)))
    return all_of


with tempfile.TemporaryDirectory() as folder:
    serve = [f"{sys.prefix}/bin/mlflow", "server", "--host", "127.0.0.1", "--port", "0", "--workers", "1"]
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as free:
        port = free.server_port
    serve[serve.index("0")] = str(port)
    serve += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts"]
    server = subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=folder)
    try:
        Proxy.behind = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                urllib.request.urlopen(Proxy.behind + "/health")
                break
            except OSError:
                time.sleep(0.25)
        proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{proxy.server_port}"
        from mlflow import MlflowClient

        client = MlflowClient(Proxy.behind)
        failed = []

        def check(what, right):
            if not right:
                failed.append(what)

        # A run, its end, and the same again.
        first = Path(folder) / "first"
        first.mkdir()
        ended = track(address, first, LINES, "--experiment", "tweets", "--name", "main")
        check(f"exit 0: {ended.stderr}", ended.returncode == 0)
        exchange = list(Proxy.kept)
        run, metrics = history(client, "tweets")
        check("points", metrics == wanted(LINES))
        check("parameters", run.data.params == {key: value if isinstance(value, str) and value else json.dumps(value, separators=(",", ":")) for key, value in SETTINGS.items()})
        check("name and status", (run.info.run_name, run.info.status) == ("main", "FINISHED"))
        track(address, first, LINES, "--experiment", "tweets")
        check("nothing is asked again", len(Proxy.kept) == len(exchange))

        # Many lines, a run that goes on, and answers that never come: each point is there once.
        draw = random.Random(1)
        many = [{"step": step, "loss": draw.random(), "learning_rate": draw.random() * 1e-4, "tokens": draw.randrange(9999)} for step in range(1, 1501)]
        second = Path(folder) / "second"
        second.mkdir()
        for part in (many[:700], many[600:]):
            Proxy.cut = 3
            ended = track(address, second, part, "--experiment", "many")
            check(f"exit 0 after answers that were cut: {ended.stderr}", ended.returncode == 0)
        run, metrics = history(client, "many")
        check("many points", metrics == wanted(many))
        print(json.dumps({"check": "track, MLflow", "mlflow": version("mlflow"), "points": sum(map(len, metrics.values())), "requests": len(Proxy.kept),
                          "failed": failed}))
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()

if "--record" in sys.argv and not failed:
    (HERE / "mlflow.jsonl").write_text("".join(json.dumps(asked) + "\n" for asked in exchange))
    provenance = {"script": "mlflow_live.py --record", "date": datetime.date.today().isoformat(), "python": platform.python_version(),
                  "mlflow": version("mlflow"), "sha256": {"mlflow.jsonl": hashlib.sha256((HERE / "mlflow.jsonl").read_bytes()).hexdigest()}}
    (HERE / "mlflow-provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")
sys.exit(bool(failed))
