#!/usr/bin/env python3
"""Reference vectors of all-MiniLM-L6-v2, from transformers and torch.

usage: make.py MODEL_DIR     (from this folder; writes vectors.f32 and provenance.json)

The pooling is that of the model card: mean over the attention mask, then the
L2 norm. The sentences were written for this test.
"""

import datetime
import hashlib
import json
import platform
import sys
from pathlib import Path

import numpy
import tokenizers
import torch
import transformers

here = Path(__file__).parent
model_dir = Path(sys.argv[1])
torch.set_num_threads(1)
# A CUDA build of torch can crash on this question where there is no driver.
torch.cuda.is_current_stream_capturing = lambda: False

sentences = json.loads((here / "sentences.json").read_text())
model = transformers.BertModel.from_pretrained(model_dir, attn_implementation="eager").eval()
tokenizer = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
tokenizer.no_padding()
tokenizer.enable_truncation(256)

rows = []
for sentence in sentences:
    ids = torch.tensor([tokenizer.encode(sentence).ids])
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    rows.append(torch.nn.functional.normalize(states.mean(0), dim=0).numpy())
vectors = numpy.stack(rows).astype("<f4")

(here / "vectors.f32").write_bytes(vectors.tobytes())
provenance = {
    "made_by": "make.py",
    "date": str(datetime.date.today()),
    "sha256": {name: hashlib.sha256((here / name).read_bytes()).hexdigest() for name in ("sentences.json", "vectors.f32")},
    "versions": {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "numpy": numpy.__version__,
    },
}
(here / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
