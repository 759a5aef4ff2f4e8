"""Writes the references of tests/track.rs: an event file by TensorBoard's own writer, and
what the W&B client sends.

python make.py, with the packages of ../requirements.txt: writes tensorboard/, wandb.json and
provenance.json beside this file.
"""
import datetime
import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path

from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from client import LINES, SETTINGS, form, of_client

HERE = Path(__file__).parent
BEGAN, ID = 1796000000123, "abcdefghij"
# Times as track read them: milliseconds since 1970.
AT = [BEGAN + 250 * at for at in range(len(LINES))]


def event(at, step, *values):
    return event_pb2.Event(wall_time=at / 1000, step=step, summary=summary_pb2.Summary(value=values))


def shown(value):
    return value if isinstance(value, str) and value else json.dumps(value, separators=(",", ":"))


folder = HERE / "tensorboard"
folder.mkdir(exist_ok=True)
head = {"v": 1, "id": ID, "to": "tensorboard", "name": None, "began": BEGAN}
lines = [{"line": {"step": line["step"], "at": at, "figures": {k: v for k, v in line.items() if k != "step"}}} for line, at in zip(LINES, AT)]
notes = [{"track": head}, {"entries": [{"settings": SETTINGS}]}, {"entries": lines}]
(folder / "track.jsonl").write_text("".join(json.dumps(note, separators=(",", ":")) + "\n" for note in notes))
(folder / "metrics.jsonl").write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in LINES))

table = "| setting | value |\n|---|---|\n" + "".join(f"| {key} | {shown(value)} |\n" for key, value in SETTINGS.items())
text = tensor_pb2.TensorProto(dtype=7, tensor_shape=tensor_shape_pb2.TensorShapeProto(), string_val=[table.encode()])
plugin = summary_pb2.SummaryMetadata.PluginData(plugin_name="text")
events = [
    event_pb2.Event(wall_time=BEGAN / 1000, file_version="brain.Event:2"),
    event(BEGAN, 0, summary_pb2.Summary.Value(tag="settings", tensor=text, metadata=summary_pb2.SummaryMetadata(plugin_data=plugin))),
]
for line, at in zip(LINES, AT):
    values = [summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in line.items() if tag != "step"]
    events.append(event(at, line["step"], *values))
with open(folder / f"events.out.tfevents.{BEGAN // 1000}.track.{ID}", "wb") as file:
    writer = RecordWriter(file)
    for written in events:
        # A scalar that is 0 is not written where it has no presence, as in `step: 0`.
        writer.write(written.SerializeToString(deterministic=True))

(HERE / "wandb.json").write_text(json.dumps(form(of_client()), indent=1, sort_keys=True) + "\n")
made = sorted(path for path in [*folder.iterdir(), HERE / "wandb.json"])
provenance = {
    "script": "make.py",
    "date": datetime.date.today().isoformat(),
    "python": platform.python_version(),
    **{name: version(name) for name in ("tensorboard", "protobuf", "wandb")},
    "sha256": {str(path.relative_to(HERE)): hashlib.sha256(path.read_bytes()).hexdigest() for path in made},
}
(HERE / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")
