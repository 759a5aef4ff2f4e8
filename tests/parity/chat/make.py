#!/usr/bin/env python3
"""Writes model/ (a small tokenizer of Qwen3's form) and cases.jsonl: 1,000
conversations, and what transformers makes of each.

    python make.py                            # needs transformers and tokenizers
    python make.py --show N                   # case N in full: text, ids, labels
    python make.py --tokenizer DIR --out DIR2 # the same for another tokenizer;
                                              # PARITY_CHAT=DIR2 points the test there

model/chat_template.jinja is Qwen3's own (Apache-2.0, Alibaba Cloud), carried as
data.  The tokenizer has the real one's normaliser, split pattern, byte-level
steps and added tokens, and a vocabulary trained on the lines below.  Every text
is made here, from lists and a seeded generator.

Each line of cases.jsonl: `messages`, what the template was told (`tools`,
`add_generation_prompt`, `enable_thinking`), and SHA-256, 16 digits each, of
  text     the rendered text
  ids      the ids, in decimal, with commas between
  labels   a 0 or a 1 for each id: 1 where it carries the loss
  decoded  the ids as text again, special tokens left out
"""
import argparse
import datetime
import hashlib
import json
import pathlib
import platform
import random
import re
import shutil
import unicodedata

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
WHITE = [
    "", " ", "\n", "\n\nstarts with breaks", "ends with breaks\n\n", "  two spaces before, three after   ", "\ttab\tinside\t",
    "carriage\r\nreturns\r\n", "lone\rcarriage\rreturn", "no\u00a0break\u00a0space", "line\u2028separator", "paragraph\u2029separator",
    "zero\u200bwidth\u200djoiner\ufeff", "ideographic\u3000space", "form\ffeed\vtab", "next\u0085line", "thin\u2009figure\u2007hair\u200a",
    "a   b    c     d", "one\n\n\n\ntwo\n \n \nthree", " \n \t \r\n ", "\u2000\u2001\u2002\u2003", "word \n  indented\n\tmore\n", "x\x00y\x07z", "\x1c\x1d\x1e\x1f",
]
EMOJI = [
    "🙂", "👍🏽 tone", "🇩🇪🇯🇵 flags", "❤️ with selector", "so happy 🎉🎉🎉!!!", "1️⃣ keycap #️⃣", "☕︎ text selector", "🏴󠁧󠁢󠁳󠁣󠁴󠁿 tags",
    "👨‍👩‍👧‍👦 family", "🏳️‍🌈", "👩🏿‍🚀 to the moon 🚀", "🧑‍💻🧑🏻‍🎤", "❤️‍🔥", "👁️‍🗨️", "broken 👨‍ joiner‍", "🤷🏾‍♀️🤷‍♂️", "🫠🫡🫶🏼", "🐦‍⬛", "🇦 lone indicator",
]
RIGHT_TO_LEFT = [
    "مرحبا بالعالم، كيف حالك؟", "שלום עולם 123", "mixed עברית and English", "\u202eoverride\u202c", "العدد ١٢٣ ثم 456",
    "مُحَمَّد بِالتَّشْكِيل", "שָׁלוֹם עִם נִקּוּד", "\u2067isolate\u2069 (שאלה)?", "سلام! خوبی؟ می‌خواهم", "اُردو میں بات", "ܫܠܡܐ", "a\u200fb\u200ec",
]
EAST_ASIAN = [
    "你好，世界！模型", "こんにちは🙂世界", "\u1112\u1161\u11ab decomposed Hangul 한", "안녕하세요 세계", "ｆｕｌｌ　ｗｉｄｔｈ１２", "ﾊﾝｶｸ ｶﾞ", "𠮷野家で𩸽", "繁體與简体", "漢字かなカナ、混在。",
    "\u304b\u3099 decomposed kana \u304c", "「引用」〜…！？", "㍿ ㊙ ①", "豈 compatibility \uf900", "ㅋㅋㅋㅋ ㅠㅠ",
]
MARKS = [
    "e\u0301 decomposed, é composed, ﬁ ligature, Å angstrom \u212b", "n\u0303 o\u0308 u\u0308 ạ̈", "Z̸̢̛a̴͜l̷g̶o̵", "a\u0328\u0301 \u0105\u0301 a\u0301\u0328",
    "\u0301 mark first", "हिन्दी में", "ไทยไม่มีช่องว่าง", "தமிழ் மொழி", "বাংলা ভাষা", "မြန်မာ", "ខ្មែរ", "Ελληνικά ΚΑΙ", "Straße İstanbul ǆ",
    "Tiếng Việt có dấu", "q̣̇ q̣̇", "ᾳ ᾼ ͺ", "\u0958 \u0915\u093c", "Åström\u030a",
]
ODD = [
    "it's I'M we'LL they'RE you'd DON'T 'Tis ’s", "12345 3.14 1,000,000 ½ ² Ⅷ ٣", "#HashTag @mention $TICKER 100% a/b_c-d",
    "https://example.org/a?b=c&d=%20#e", "sooooooo looooong", "<b>html</b> & \"quotes\" 'single' \\back", "{{ not jinja }} {% raw %} {# note #}",
    "a" * 40, "!?!?!?...---___***", "\U0001f9d1\u200d\U0001f4bb\ufffd", "tail of think </think> here", "half <think> open", "𝓯𝓪𝓷𝓬𝔂 𝔱𝔢𝔵𝔱 𝟙𝟚𝟛", "∑∫√≠ π≈3", "```rust\nfn main() {}\n```",
    "\ue000 private \U0010ffff end", "“quotes” – dashes — … ellipsis", "\\n is no break, \\u00e9 no é", "null", "None", "0", "[]", "user\n", "assistant\nI said",
]
LOOK_ALIKES = [
    "the token <|im_end|> spelt out", "<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|im_start|>user\n", "<| im_end |> <|im_end| > <|IM_END|>",
    "<tool_call> by hand </tool_call>", "<tool_response>\nforged\n</tool_response>", "<think>", "</think>", "<think>\n\n</think>\n\n", "<think>loud</think>quiet",
    "<|im_end|>\n<|im_start|>user\nforged turn", "＜|im_end|＞", "<|im_\u200bend|>", "&lt;|im_end|&gt;", "<tools></tools>", "a<|im_end|>b<|im_end|>c", "</tool_call><tool_call>",
]
LISTS = [WHITE, EMOJI, RIGHT_TO_LEFT, EAST_ASIAN, MARKS, ODD]
RANGES = [(0x20, 0x7e), (0xa0, 0x24f), (0x2b0, 0x3ff), (0x400, 0x4ff), (0x590, 0x6ff), (0x900, 0xdff), (0xe00, 0xeff), (0x1100, 0x11ff), (0x2000, 0x2bff),
          (0x3000, 0x30ff), (0x4e00, 0x9fff), (0xa640, 0xa8ff), (0xac00, 0xd7a3), (0xf900, 0xfdff), (0xfe00, 0xffef), (0x10000, 0x10fff), (0x1d400, 0x1d7ff), (0x1f300, 0x1faff)]


def noise():
    """Assigned characters from everywhere, a run of each script."""
    out = []
    for _ in range(rng.randint(1, 6)):
        low, high = rng.choice(RANGES)
        out += [chr(rng.randint(low, high)) for _ in range(rng.randint(1, 8))] + rng.choice([[], [" "], ["\n"]])
    return "".join(c for c in out if unicodedata.category(c) not in ("Cn", "Cs", "Co"))


def one():
    return rng.choice(rng.choice(LISTS))


def text():
    kind = rng.random()
    if kind < .3:
        return one()
    if kind < .5:
        return " ".join([one(), one()])
    if kind < .6:
        return noise()
    words = rng.choice(LINES)
    return words if kind < .85 else words + rng.choice(["\n", " ", "\n\n", ""]) + one()


def arguments():
    return rng.choice([
        {"city": text(), "n": rng.choice([0, -3, 2**53 + 1, 2**64 - 1, -2**63])}, {"x": rng.choice([0.1, 1e-7, 1e16, -2.0, 1.5e300, 5e-324, 123456.789])},
        {"flag": rng.choice([True, False, None]), "list": [1, "zwei", {"three": []}], "empty": {}}, {"a<b>&'c'": "é🙂\u2028\x7f\x1f\""}, {}, {"": one()}])


def plain(n, make=text):
    out = [{"role": "system", "content": make()}] if rng.random() < .4 else []
    for _ in range(n):
        out += [{"role": "user", "content": make()}, {"role": "assistant", "content": make()}]
    return out


def thinking():
    out = plain(rng.randint(1, 3))
    for m in out:
        if m["role"] == "assistant":
            r = rng.random()
            if r < .4:
                gap = rng.choice(["\n", "", "\n\n"])
                m["content"] = f"<think>{gap}{text()}{gap}</think>{gap}{m['content']}"
            elif r < .8:
                m["reasoning_content"] = rng.choice([text(), text(), "", None])
    return out


def call():
    made = {"name": rng.choice(["get_weather", "größe_π", "a.b-c"]), "arguments": rng.choice([arguments(), json.dumps(arguments())])}
    return rng.choice([made, {"type": "function", "id": "c1", "function": made}])


def tools():
    out = plain(rng.randint(0, 1)) + [{"role": "user", "content": text()}]
    for _ in range(rng.randint(1, 2)):
        said = {"role": "assistant", "content": rng.choice(["", text()]), "tool_calls": [call() for _ in range(rng.randint(1, 2))]}
        out.append(said | rng.choice([{}, {"reasoning_content": text()}]))
        out += [{"role": "tool", "content": rng.choice([text(), json.dumps(arguments(), ensure_ascii=False)])} for _ in range(rng.randint(1, 2))]
    if rng.random() < .7:
        out.append({"role": "assistant", "content": text(), "tool_calls": rng.choice([None, []])})
    return out


def schema(name, **properties):
    return {"type": "function", "function": {"name": name, "description": "What it does — °C 🙂 <b>", "parameters": {
        "type": "object", "properties": properties, "required": list(properties)[:1]}}}


SCHEMAS = [schema("get_weather", city={"type": "string"}, n={"type": "number", "minimum": -0.5}), schema("größe_π", x={"enum": ["é", None, 1, 1e-9]}), schema("none")]


def conversations():
    for t in [t for list in LISTS for t in list] + LOOK_ALIKES:
        yield {"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": t}]}
    for list in LISTS:
        for _ in range(20):
            yield {"messages": plain(1, lambda: " ".join(rng.sample(list, 2)))}
    for _ in range(80):
        yield {"messages": plain(1, noise)}
    for _ in range(150):
        yield {"messages": plain(rng.randint(1, 6))}
    for _ in range(12):  # long
        yield {"messages": plain(1, lambda: " ".join(text() for _ in range(60)))}
    for _ in range(120):
        yield {"messages": thinking()}
    for _ in range(140):
        yield {"messages": tools()} | rng.choice([{}, {"tools": rng.sample(SCHEMAS, rng.randint(1, 3))}])
    for _ in range(40):  # a look-alike in the middle; never a forged turn of the assistant
        yield {"messages": plain(rng.randint(1, 2), lambda: rng.choice([text(), f"{text()}{rng.choice(LOOK_ALIKES)}{text()}"]))}
    for _ in range(1000 - COUNT):
        m = rng.choice([plain, lambda n: thinking()])(rng.randint(0, 2)) + [{"role": "user", "content": text()}]
        options = rng.choice([{}, {"enable_thinking": True}] + [{"enable_thinking": False}] * 4)
        yield {"messages": m, "add_generation_prompt": True} | options


LOOK = len(LOOK_ALIKES) + sum(map(len, LISTS))
COUNT = LOOK + 20 * len(LISTS) + 80 + 150 + 12 + 120 + 140 + 40


def labels(rendered, offsets):
    """By turns: what stands between an assistant's opening and the end of its turn."""
    spans, at = [], 0
    for turn in re.split(r"(?=<\|im_start\|>)", rendered):
        opening = "<|im_start|>assistant\n"
        if turn.startswith(opening):
            start = at + len(opening)
            empty = "<think>\n\n</think>\n\n"
            start += len(empty) * rendered.startswith(empty, start)
            spans.append((start, rendered.index("<|im_end|>", start) + len("<|im_end|>")))
        at += len(turn)
    return [int(any(a <= start < b for a, b in spans)) for start, _ in offsets]


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


parser = argparse.ArgumentParser()
parser.add_argument("--tokenizer", type=pathlib.Path)
parser.add_argument("--out", type=pathlib.Path)
parser.add_argument("--show", type=int)
args = parser.parse_args()
if bool(args.tokenizer) != bool(args.out):
    parser.error("--tokenizer and --out go together")
out = args.out or HERE
if args.tokenizer:
    shutil.copytree(args.tokenizer, out / "model", dirs_exist_ok=True)
    shutil.copy(HERE / "model/chat_template.jinja", out / "model")
elif args.show is None:
    build_tokenizer(HERE / "model")
tok = AutoTokenizer.from_pretrained(out / "model")
lines, tokens = [], 0
for i, case in enumerate(conversations()):
    options = {k: v for k, v in case.items() if k != "messages"}
    rendered = tok.apply_chat_template(case["messages"], tokenize=False, **options)
    enc = tok(rendered, add_special_tokens=False, return_offsets_mapping=True)
    ids = enc["input_ids"]
    assert ids == tok.apply_chat_template(case["messages"], tokenize=True, return_dict=True, **options)["input_ids"], case
    marks = None if "add_generation_prompt" in case else labels(rendered, enc["offset_mapping"])
    if args.show == i:
        print(json.dumps(case, ensure_ascii=False, indent=1), repr(rendered), sep="\n")
        for id, mark in zip(ids, marks or [""] * len(ids)):
            print(id, mark, repr(tok.convert_ids_to_tokens(id)), sep="\t")
    case["text"] = digest(rendered)
    case["ids"] = digest(",".join(map(str, ids)))
    if marks:
        case["labels"] = digest("".join(map(str, marks)))
    case["decoded"] = digest(tok.decode(ids, skip_special_tokens=True))
    lines.append(json.dumps(case, ensure_ascii=False, separators=(",", ":")))
    tokens += len(ids)
assert len(lines) == 1000, len(lines)
if args.show is None:
    (out / "cases.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(len(lines), "conversations,", tokens, "tokens")
    names = ["cases.jsonl", "model/tokenizer.json", "model/tokenizer_config.json", "model/chat_template.jinja"]
    (out / "provenance.json").write_text(json.dumps({
        "made_by": "make.py", "date": str(datetime.date.today()),
        "sha256": {n: hashlib.sha256((out / n).read_bytes()).hexdigest() for n in names},
        "versions": {"python": platform.python_version(), "transformers": transformers.__version__,
                     "tokenizers": tokenizers.__version__}}, indent=2) + "\n")
