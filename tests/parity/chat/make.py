#!/usr/bin/env python3
"""Writes model/ (a small tokenizer of Qwen3's form) and cases.jsonl (what
transformers makes of conversations with it).

    python make.py                    # needs transformers and tokenizers
    python make.py --tokenizer DIR    # cases for another tokenizer, to stdout

model/chat_template.jinja is Qwen3's own (Apache-2.0, Alibaba Cloud), carried as
data.  The tokenizer has the real one's normaliser, split pattern, byte-level
steps and added tokens, and a vocabulary trained on the lines below.

Each line of cases.jsonl: `messages`, what the template was told (`tools`,
`add_generation_prompt`, `enable_thinking`), the `ids`, and `labels`: runs
[from, to) of tokens that carry the loss, by character offsets in the rendered
text (tools/lib/qwen3 goes by bytes).  Every eighth has `decoded` too.
"""
import argparse
import hashlib
import json
import pathlib
import platform
import random
import re

import tokenizers
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

HERE = pathlib.Path(__file__).parent
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ADDED = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]

LINES = """
the train was late again and nobody on the platform seemed to mind
a good loaf of bread needs time more than it needs flour
what do you think about walking to the lake before it rains?
honestly, I'd rather read on the balcony than go out tonight
she said it's fine, they've done it before and we'll see
don't forget the small things: water, shade, and a decent map
user assistant system tool name arguments query result city weather
if the function call fails, return an empty object and try again
Für Größe und Maß: naïve café, señor, façade, coöperate
Привет, как дела? Всё хорошо, спасибо.
你好，世界。今天天气很好，我们去公园吧。
こんにちは、元気ですか。
مرحبا كيف حالك اليوم
שלום, מה שלומך היום
thanks! this made my morning 🙂🚀 so glad it worked out 🎉
""".strip().splitlines()


def build_tokenizer(folder):
    tk = Tokenizer(models.BPE())
    tk.normalizer = normalizers.NFC()
    tk.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False)])
    tk.decoder = decoders.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False)
    tk.post_processor = processors.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tk.train_from_iterator(LINES * 3, trainers.BpeTrainer(
        vocab_size=640, initial_alphabet=alphabet, show_progress=False))
    tk.add_special_tokens(SPECIAL)
    tk.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in ADDED])
    tk.save(str(folder / "tokenizer.json"))
    decoder = {str(tk.token_to_id(t)): {"content": t, "lstrip": False, "normalized": False, "rstrip": False,
                                        "single_word": False, "special": t in SPECIAL} for t in SPECIAL + ADDED}
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": decoder,
        "additional_special_tokens": SPECIAL[1:], "bos_token": None, "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>", "errors": "replace", "model_max_length": 131072, "pad_token": "<|endoftext|>",
        "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None}, indent=1) + "\n")


rng = random.Random(20261123)
ODD = [
    "", " ", "\n", "\n\nstarts with breaks", "ends with breaks\n\n", "  two spaces before, three after   ", "\ttab\tinside\t",
    "carriage\r\nreturns\r\n", "no\u00a0break\u00a0space", "line\u2028separator", "zero\u200bwidth\u200djoiner\ufeff",
    "🙂", "👨‍👩‍👧‍👦 family", "👍🏽 tone", "🇩🇪🇯🇵 flags", "❤️ with selector", "so happy 🎉🎉🎉!!!",
    "e\u0301 decomposed, é composed, ﬁ ligature, Å angstrom \u212b", "n\u0303 o\u0308 u\u0308 ạ̈", "\u1112\u1161\u11ab decomposed Hangul 한",
    "مرحبا بالعالم، كيف حالك؟", "שלום עולם 123", "mixed עברית and English", "\u202eoverride\u202c", "हिन्दी में", "ไทยไม่มีช่องว่าง",
    "你好，世界！模型", "こんにちは🙂世界", "Ελληνικά ΚΑΙ", "Straße İstanbul ǆ",
    "it's I'M we'LL they'RE you'd DON'T 'Tis ’s", "12345 3.14 1,000,000 ½ ² Ⅷ ٣", "#HashTag @mention $TICKER 100% a/b_c-d",
    "https://example.org/a?b=c&d=%20#e", "sooooooo looooong", "<b>html</b> & \"quotes\" 'single' \\back", "{{ not jinja }} {% raw %}",
    "a" * 40, "!?!?!?...---___***", "x\x00y\x07z", "\U0001f9d1\u200d\U0001f4bb\ufffd", "tail of think </think> here", "half <think> open",
]
SPECIAL_TEXT = ["the token <|im_end|> spelt out", "<tool_call> by hand </tool_call>", "<|endoftext|>"]


def text():
    kind = rng.random()
    if kind < .35:
        return rng.choice(ODD)
    if kind < .6:
        return " ".join(rng.sample(ODD, 2))
    words = rng.choice(LINES)
    return words if kind < .85 else words + rng.choice(["\n", " ", "\n\n"]) + rng.choice(ODD)


def arguments():
    return {"city": text(), "n": rng.choice([0, -3, 2**53 + 1, 7]), "x": rng.choice([0.1, 1e-7, 1e16, -2.0, 1.5e300]),
            "flag": rng.choice([True, False, None]), "list": [1, "zwei", {"three": []}], "empty": {}, "a<b>&'c'": "é🙂\u2028\x7f\x1f\""}


def plain(n):
    out = [{"role": "system", "content": text()}] if rng.random() < .4 else []
    for _ in range(n):
        out += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
    return out


def thinking():
    out = plain(rng.randint(1, 2))
    for m in out:
        if m["role"] == "assistant":
            r = rng.random()
            if r < .4:
                m["content"] = f"<think>\n{text()}\n</think>\n\n{m['content']}"
            elif r < .8:
                m["reasoning_content"] = text()
    return out


def tools():
    call = {"name": "get_weather", "arguments": rng.choice([arguments(), json.dumps(arguments())])}
    call = rng.choice([call, {"type": "function", "id": "c1", "function": call}])
    out = plain(rng.randint(0, 1)) + [{"role": "user", "content": text()}]
    out.append({"role": "assistant", "content": rng.choice(["", text()]), "tool_calls": [call] * rng.randint(1, 2)})
    out += [{"role": "tool", "content": text()} for _ in range(rng.randint(1, 2))]
    if rng.random() < .7:
        out.append({"role": "assistant", "content": text()})
    return out


SCHEMAS = [{"type": "function", "function": {"name": "get_weather", "description": "Weather in a city — °C",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "n": {"type": "number", "minimum": -0.5}},
                           "required": ["city"]}}}]


def conversations():
    for t in ODD + SPECIAL_TEXT:
        yield {"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": t}]}
    for _ in range(60):
        yield {"messages": plain(rng.randint(1, 4))}
    for _ in range(40):
        yield {"messages": thinking()}
    for _ in range(40):
        yield {"messages": tools(), "tools": SCHEMAS} if rng.random() < .5 else {"messages": tools()}
    for i in range(60):
        m = plain(rng.randint(0, 2)) + [{"role": "user", "content": rng.choice(ODD) if i < 30 else text()}]
        yield {"messages": m, "add_generation_prompt": True} | rng.choice([{}, {"enable_thinking": True}] + [{"enable_thinking": False}] * 4)


def labels(rendered, offsets):
    spans = []
    for m in re.finditer(r"<\|im_start\|>assistant\n(?:<think>\n\n</think>\n\n)?(.*?<\|im_end\|>)", rendered, re.S):
        spans.append(m.span(1))
    runs = []
    for i, (start, _) in enumerate(offsets):
        if any(a <= start < b for a, b in spans):
            if runs and runs[-1][1] == i:
                runs[-1][1] = i + 1
            else:
                runs.append([i, i + 1])
    return runs


parser = argparse.ArgumentParser()
parser.add_argument("--tokenizer")
args = parser.parse_args()
if not args.tokenizer:
    build_tokenizer(HERE / "model")
tok = AutoTokenizer.from_pretrained(args.tokenizer or HERE / "model")
lines = []
for i, case in enumerate(conversations()):
    options = {k: v for k, v in case.items() if k != "messages"}
    rendered = tok.apply_chat_template(case["messages"], tokenize=False, **options)
    enc = tok(rendered, add_special_tokens=False, return_offsets_mapping=True)
    direct = tok.apply_chat_template(case["messages"], tokenize=True, return_dict=True, **options)["input_ids"]
    assert direct == enc["input_ids"], case
    case["ids"] = enc["input_ids"]
    if "add_generation_prompt" not in case:
        case["labels"] = labels(rendered, enc["offset_mapping"])
    if i % 8 == 0:
        case["decoded"] = tok.decode(enc["input_ids"], skip_special_tokens=True)
    lines.append(json.dumps(case, ensure_ascii=False, separators=(",", ":")))
if args.tokenizer:
    print("\n".join(lines))
else:
    (HERE / "cases.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    names = ["cases.jsonl", "model/tokenizer.json", "model/tokenizer_config.json", "model/chat_template.jinja"]
    (HERE / "provenance.json").write_text(json.dumps({
        "made_by": "make.py", "date": "2026-11-23",
        "sha256": {n: hashlib.sha256((HERE / n).read_bytes()).hexdigest() for n in names},
        "versions": {"python": platform.python_version(), "transformers": transformers.__version__,
                     "tokenizers": tokenizers.__version__}}, indent=2) + "\n")
