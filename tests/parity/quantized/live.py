"""The base that `qlora-train --save-quantized` writes, loaded by transformers and bitsandbytes.

python live.py [SEED]: prints one JSON line; exit 1 where something differs. A random
Qwen3 is saved in bf16 and given to qlora-train; transformers loads what came of it, as
anybody would, and must find the weights to within NF4's rounding, and the logits that
qwen3's example `logits` finds over the same folder. qlora-train and
logits are taken from the PATH.
"""
import json
import pathlib
import random
import subprocess
import sys
import tempfile

import bitsandbytes
import numpy as np
import peft
import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

transformers.logging.set_verbosity_error()
# Seeds 1 to 4: 7.7e-6 at most (2026-11-23); room for another machine's sums.
LOGIT_TOLERANCE = 5e-5
# Largest difference of a decoded weight from the stored one, in scales of its block: half
# the widest gap between NF4's levels, 0.152, and what the scale loses.
WEIGHT_TOLERANCE = 0.17


def main():
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else random.randrange(10**6)
    torch.manual_seed(seed)
    worst_weight = worst_logit = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        for tied in (True, False):
            config = Qwen3Config(
                vocab_size=320, hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, head_dim=32, max_position_embeddings=128, tie_word_embeddings=tied,
                bos_token_id=None, eos_token_id=1, initializer_range=0.1)
            source, folder, adapter = (scratch / f"{name}-{tied}" for name in ("source", "quantized", "adapter"))
            Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
            run = subprocess.run(["qlora-train", "--model", source, "--save-quantized", folder, "--quiet"],
                                 capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", device_map="cpu").eval()
            stored = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
            for parameter in model.parameters():  # the rest is loaded in bf16, whatever is asked for
                if parameter.is_floating_point():
                    parameter.data = parameter.data.float()
            quantised = 0
            for name, module in model.named_modules():
                if not isinstance(module, bitsandbytes.nn.Linear4bit):
                    continue
                quantised += 1
                state = module.weight.quant_state
                state.dtype = module.compute_dtype = torch.float32
                module.support_avx512bf16_for_cpu = False  # whose products are rounded to bf16
                ours = bitsandbytes.functional.dequantize_4bit(module.weight.data, state).reshape(state.shape)
                want = stored.get_submodule(name).weight.data
                off = (ours - want).abs().reshape(-1, 64) / want.abs().reshape(-1, 64).amax(1, keepdim=True)
                worst_weight = max(worst_weight, off.max().item())
            assert quantised == 3 * 7
            # The example wants an adapter: one that adds nothing.
            nothing = peft.get_peft_model(stored, peft.LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM"))
            nothing.save_pretrained(adapter)
            ids = torch.randint(0, 320, (1, 60))
            with torch.no_grad():
                theirs = model(input_ids=ids).logits[0].float().numpy().ravel()
            run = subprocess.run(["logits", folder, adapter], input=json.dumps(ids[0].tolist()), capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            ours = np.array(json.loads(run.stdout), dtype=np.float32)
            assert ours.shape == theirs.shape
            worst_logit = max(worst_logit, float(np.abs(ours - theirs).max()))
    passed = worst_weight <= WEIGHT_TOLERANCE and worst_logit <= LOGIT_TOLERANCE
    print(json.dumps({"check": "quantized", "bitsandbytes": bitsandbytes.__version__, "transformers": transformers.__version__,
                      "seed": seed, "worst_weight": worst_weight, "logit_difference": worst_logit, "passed": passed}))
    sys.exit(not passed)


if __name__ == "__main__":
    main()
