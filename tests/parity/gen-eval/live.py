"""gen-eval against transformers and peft: likelihoods and greedy replies.

python live.py [SEED]: prints one JSON line; exit 1 where a reply differs or a mean
NLL is further off than TOLERANCE. The base is the demo's model, the adapter a random
one that peft makes and saves. gen-eval is taken from the PATH.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import peft
import torch
import transformers

# f32 on both sides, sums in another order: over three seeds the largest was 1.9e-6.
TOLERANCE, NEW_TOKENS = 1e-5, 24
MODEL = Path(__file__).parents[2] / "demo/model"
PAIRS = [
    ("Anyone else up this early?", "Every day since the bakery opened!"),
    ("My cat sat on the keyboard again", "Then the cat wrote this, right?"),
    ("Rain all week 🌧️", "Good for the garden 🌱"),
    ("What do you read on trains?", "Other people's newspapers"),
    ("I painted the door blue\n\nTwice.", "Which blue? There are forty, at 3.5% off."),
    ("Monday", "No"),
]
# Of split train, for the system `prompted`; which order they are drawn in is gen-eval's own.
SHOWN = {
    "a": ("Is soup a drink?", "Only if you are late for work 🥣"),
    "b": ("New phone, same cracked screen", "At least it matches the old one"),
    "c": ("Why is it always the last key", "Because then you stop looking."),
}
SYSTEM = "You write short replies."
torch.manual_seed(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
torch.use_deterministic_algorithms(True)
tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
base = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager").eval()
stops = base.generation_config.eos_token_id
stops = stops if isinstance(stops, list) else [stops]
REPLY_END = tokenizer.convert_tokens_to_ids("<|im_end|>")


def messages(tweet, shown):
    turns = [{"role": "system", "content": SYSTEM}]
    for asked, said in shown:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return turns + [{"role": "user", "content": tweet}]


def answer(model, tweet, reply, shown=()):
    prompt = tokenizer.apply_chat_template(messages(tweet, shown), tokenize=False, add_generation_prompt=True, enable_thinking=False)
    # Tokenised as one text, as in training; the prompt is a whole number of its tokens.
    head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(prompt + reply + "<|im_end|>", add_special_tokens=False)["input_ids"]
    assert ids[: len(head)] == head and ids[-1] == REPLY_END
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        new = model.generate(input_ids=torch.tensor([head]), attention_mask=torch.ones(1, len(head), dtype=torch.long),
                             max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(head):].tolist()
    losses = -torch.log_softmax(logits, -1)[torch.arange(len(head) - 1, len(ids) - 1), ids[len(head):]]
    cut = next((i for i, token in enumerate(new) if token in stops), None)
    return {
        "nll": losses.mean().item(), "tokens": len(losses), "finish": "length" if cut is None else "stop",
        "prediction": tokenizer.decode(new[:cut], skip_special_tokens=True).strip(),
    }


with tempfile.TemporaryDirectory() as folder:
    theirs = {"base": [answer(base, *pair) for pair in PAIRS]}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM")).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.uniform_(parameter, -0.05, 0.05)
    adapted.save_pretrained(folder)
    theirs["lora"] = [answer(adapted, *pair) for pair in PAIRS]

    sides = {"eval": {str(i): pair for i, pair in enumerate(PAIRS)}, "train": SHOWN}
    rows = "".join(json.dumps({"v": 1, "id": id, "tweet": t, "reply": r, "split": side}) + "\n"
                   for side, pairs in sides.items() for id, (t, r) in pairs.items())
    config = Path(folder) / "eval.yaml"
    config.write_text(f"generation: {{system_prompt: {SYSTEM}, text: raw, quantization: none, max_new_tokens: {NEW_TOKENS}}}\n")
    run = subprocess.run(["gen-eval", "--model", MODEL, "--adapter", folder, "--config", config, "--quiet"],
                         input=rows.encode(), capture_output=True, check=True)

*items, corpus = [json.loads(line) for line in run.stdout.decode().split("\n") if line]
drawn = corpus["corpus"]["prompted"]["examples"]
assert sorted(drawn) == sorted(SHOWN), drawn
adapted.disable_adapter_layers()
theirs["prompted"] = [answer(adapted, *pair, [SHOWN[name] for name in drawn]) for pair in PAIRS]
worst, differing = 0.0, []
for name, answers in theirs.items():
    for item, expected in zip(items, answers, strict=True):
        ours = item["systems"][name]
        worst = max(worst, abs(ours["nll"] - expected["nll"]))
        same = all(ours[key] == expected[key] for key in ("prediction", "finish")) and item["reference_tokens"] == expected["tokens"]
        if not same or abs(ours["nll"] - expected["nll"]) > TOLERANCE:
            differing.append({"system": name, "ours": ours, "theirs": expected})
print(json.dumps({"check": "gen-eval", "transformers": transformers.__version__, "peft": peft.__version__, "replies": len(theirs) * len(PAIRS),
                  "largest_nll_difference": worst, "differing": differing}, ensure_ascii=False))
sys.exit(bool(differing))
