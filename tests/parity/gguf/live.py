"""The GGUF file that `qlora-train merge --gguf` writes, read by others.

python live.py [SEED]: prints one JSON line; exit 1 where something differs. A random Qwen3
with heads of 128 features (transformers assumes them in a GGUF file) and a random adapter
are merged into both forms; every tensor of the GGUF file must be that of the other form,
under the name that the package `gguf` gives it, and transformers must find the same logits
and ids in both. qlora-train is taken from the PATH. llama.cpp itself is not run.
"""
import importlib.metadata
import json
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile

import gguf
import numpy as np
import peft
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
DEMO = pathlib.Path(__file__).parents[2] / "demo/model"
LAYERS = 2
TEXTS = ["Rain again, and no umbrella 🌂", "<|im_start|>user\nTea?<|im_end|>\n", "naïve   spaces\n\nשלום"]


def main():
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else random.randrange(10**6)
    torch.manual_seed(seed)
    failures = []
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        base, adapter, merged, file = (scratch / name for name in ("base", "adapter", "merged", "replies.gguf"))
        demo = json.loads((DEMO / "config.json").read_text())
        Qwen3ForCausalLM(Qwen3Config(
            vocab_size=demo["vocab_size"], hidden_size=256, intermediate_size=320, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, head_dim=128, max_position_embeddings=256, rms_norm_eps=1e-3, rope_theta=5e4,
            tie_word_embeddings=False, initializer_range=0.1, bos_token_id=None, eos_token_id=demo["eos_token_id"],
        )).to(torch.bfloat16).save_pretrained(base)
        for path in DEMO.iterdir():  # tokenizer, template, generation_config.json
            if path.suffix in (".json", ".jinja", ".txt") and not (base / path.name).exists():
                shutil.copy(path, base)
        adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(
            r=4, target_modules=["q_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM"))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.uniform_(parameter, -0.05, 0.05)
        adapted.save_pretrained(adapter)
        run = subprocess.run(["qlora-train", "merge", "--model", base, "--adapter", adapter, "--out", merged, "--gguf", file, "--quiet"],
                             capture_output=True, text=True)
        assert run.returncode == 0, run.stderr

        theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, LAYERS)
        want = {}
        for name, tensor in load_file(merged / "model.safetensors").items():
            stem, kind = name.rsplit(".", 1)
            want[f"{theirs.get_name(stem)}.{kind}"] = tensor
        found = {}
        for tensor in gguf.GGUFReader(file).tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            found[tensor.name] = torch.from_numpy(np.array(values, dtype=np.float32))
        if found.keys() != want.keys():
            failures.append(f"other names: {sorted(found.keys() ^ want.keys())}")
        for name in found.keys() & want.keys():
            if not torch.equal(found[name], want[name].float()):
                failures.append(f"{name} differs")

        ours, other = (AutoTokenizer.from_pretrained(*where[:1], **where[1]) for where in ((merged, {}), (scratch, {"gguf_file": file.name})))
        for text in TEXTS:
            if ours(text)["input_ids"] != other(text)["input_ids"]:
                failures.append(f"other ids for {text!r}: {ours(text)['input_ids']} {other(text)['input_ids']}")
        ids = torch.randint(0, demo["vocab_size"], (1, 40))
        with torch.no_grad():
            logits = [AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **more)(input_ids=ids).logits
                      for where, more in ((merged, {}), (scratch, {"gguf_file": file.name}))]
        if not torch.equal(*logits):
            failures.append(f"logits differ by {(logits[0] - logits[1]).abs().max().item():e}")
    print(json.dumps({"check": "gguf", "gguf": importlib.metadata.version("gguf"),
                      "transformers": transformers.__version__, "seed": seed, "tensors": len(want), "failures": failures}))
    sys.exit(bool(failures))


main()
