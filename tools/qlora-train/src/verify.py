"""What transformers (and peft) make of a model: token ids, likelihoods, greedy text.

qlora-train inspect --verify runs this with a request in JSON on standard input and
compares the answer, JSON on standard output, with its own.
"""
import json
import math
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
request = json.load(sys.stdin)
try:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if request["adapter"]:
        import peft
except ImportError as error:
    print(json.dumps({"missing": error.name or str(error)}))
    sys.exit(0)

transformers.utils.logging.set_verbosity_error()
# In f32 both sides compute the same up to rounding; where that does not fit, bfloat16.
fits = 4 * request["parameters"] < 0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
dtype = torch.float32 if fits else torch.bfloat16
tokenizer = AutoTokenizer.from_pretrained(request["model"])
model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=dtype)
if request["adapter"]:
    model = peft.PeftModel.from_pretrained(model, request["adapter"])
model.eval()


def render(messages, **options):
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


rows = []
for prompt, reply in request["rows"]:
    user = [{"role": "user", "content": prompt}]
    head = render(user, add_generation_prompt=True, enable_thinking=False)
    ids = render(user + [{"role": "assistant", "content": reply}])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
        losses = -torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), ids[1:]]
        made = model.generate(
            input_ids=torch.tensor([head]), attention_mask=torch.ones(1, len(head), dtype=torch.long),
            max_new_tokens=request["max_new_tokens"], do_sample=False)[0, len(head):].tolist()
    losses = [loss if math.isfinite(loss) else None for loss in losses.tolist()]
    rows.append({"prompt": head, "row": ids, "nll": losses, "greedy": made})
versions = {"torch": torch.__version__, "transformers": transformers.__version__}
if request["adapter"]:
    versions["peft"] = peft.__version__
print(json.dumps({"dtype": str(dtype).removeprefix("torch."), "versions": versions, "rows": rows}))
