#!/usr/bin/env python3
"""What transformers computes with the demo's model: writes cases.json and provenance.json.

The autograd model in tests/tiny-model must give the same logits. Weights are the
committed bf16 values, arithmetic is f32, attention eager. Ids come from
transformers' own rendering of the chat template.
"""
import datetime
import hashlib
import json
import pathlib
import platform

import torch
import transformers

HERE = pathlib.Path(__file__).resolve().parent
MODEL = HERE.parents[1] / "demo" / "model"
# A CUDA build of torch can crash on this question where there is no driver.
torch.cuda.is_current_stream_capturing = lambda: False
CHATS = [
    ("Day 3 with my sourdough. The crust came out pale. Any ideas?", "Perhaps a hotter oven."),
    ("My printer says there is no paper, and it is full of paper 🙃", "Fan the sheets first!"),
    ("naïve question…   what is a ridge walk?\nI really do not know.", "A walk along the top."),
]

tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
model = transformers.AutoModelForCausalLM.from_pretrained(
    MODEL, dtype=torch.float32, attn_implementation="eager"
).eval()

rows = []
for tweet, reply in CHATS:
    user = [{"role": "user", "content": tweet}]
    chat = user + [{"role": "assistant", "content": reply}]
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    prompt = tokenizer.apply_chat_template(
        user, add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    assert ids[: len(prompt)] == prompt
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
        answer = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, temperature=None, top_k=None, top_p=None, max_new_tokens=48,
        )[0, len(prompt):].tolist()
    nll = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    rows.append({
        "ids": ids,
        "prompt_tokens": len(prompt),
        "nll": nll.tolist(),
        "last_logits": logits[-1].tolist(),
        "greedy": answer,
        "greedy_text": tokenizer.decode(answer),
    })

(HERE / "cases.json").write_text(json.dumps(rows) + "\n")
digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
(HERE / "provenance.json").write_text(json.dumps({
    "made_by": "make.py",
    "date": str(datetime.date.today()),
    "sha256": {"cases.json": digest(HERE / "cases.json"), "../../demo/model/model.safetensors": digest(MODEL / "model.safetensors")},
    "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
}, indent=2) + "\n")
