"""The base that `qlora-train --save-quantized` writes, loaded by transformers and bitsandbytes.

python live.py [SEED]: prints one JSON line; exit 1 where something differs. A random
Qwen3 is saved in bf16 and given to qlora-train; transformers loads what came of it, as
anybody would: its codes must be those of bitsandbytes' own quantising, its scales the
nearest that two levels allow, and the logits those that qwen3's example `logits` finds over
the same folder. qlora-train and logits are taken from the PATH.
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


def differing(state, packed, weight):
    """What of a weight in 4 bits is not as bitsandbytes makes it. The codes and the largest of
    each block are compared bit by bit. The scales' own codes are not: bitsandbytes looks them
    up in a table on a CPU, one off in some, and takes the nearest on a GPU, as ours must be."""
    codes, plain = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=False, quant_type="nf4")
    wrong = int((packed.flatten() != codes.flatten()).sum())
    offset, nested = state.offset.double(), state.state2
    # The order of a sum shows in the last place of a mean.
    wrong += not torch.isclose(offset, plain.absmax.double().mean(), rtol=2e-7, atol=0)
    rest = torch.nn.functional.pad((plain.absmax - state.offset), (0, -plain.absmax.numel() % 256))
    largest = rest.reshape(-1, 256).abs().amax(1)
    wrong += int((largest != nested.absmax).sum())
    scaled = (plain.absmax - state.offset).double() / largest.repeat_interleave(256)[: plain.absmax.numel()].double()
    chosen = (nested.code[state.absmax.long()].double() - scaled).abs()
    nearest = (nested.code[None].double() - scaled[:, None]).abs().amin(1)
    return wrong + int((chosen > nearest + 1e-7).sum())  # a tie may go either way


def main():
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else random.randrange(10**6)
    torch.manual_seed(seed)
    wrong, worst_logit = 0, 0.0
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
                wrong += differing(state, module.weight.data, stored.get_submodule(name).weight.data)
                state.dtype = module.compute_dtype = torch.float32
                module.support_avx512bf16_for_cpu = False  # whose products are rounded to bf16
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
    passed = wrong == 0 and worst_logit <= LOGIT_TOLERANCE
    print(json.dumps({"check": "quantized", "bitsandbytes": bitsandbytes.__version__, "transformers": transformers.__version__,
                      "seed": seed, "codes_differing": wrong, "logit_difference": worst_logit, "passed": passed}))
    sys.exit(not passed)


if __name__ == "__main__":
    main()
