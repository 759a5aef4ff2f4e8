"""The base that `qlora-train --save-quantized` writes, loaded by transformers and bitsandbytes.

python live.py [SEED]: prints one JSON line; exit 1 where something differs. A random
Qwen3 is saved in bf16 and given to qlora-train; transformers loads what came of it, as
anybody would: its codes and scales must be those of bitsandbytes' own quantising, bit for
bit, in matrices of odd sizes too, and the logits those that qwen3's example `logits` finds
over the same folder. qlora-train and logits are taken from the PATH.
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
# Tied, hidden and intermediate size: of the last, gate_proj is 12,415 values, an odd number
# that ends 63 values into a block. Its logits are not compared: bitsandbytes' AVX-512 decodes
# wrongly where 64 does not divide the columns.
SHAPES = [(True, 128, 192), (False, 128, 192), (False, 65, 191)]


def differing(state, packed, weight):
    """What of a weight in 4 bits is not as bitsandbytes makes it: how many bytes of codes, codes
    of scales and largest scales, and how many of the latter's codes bitsandbytes' CPU path has
    otherwise (told, not judged).

    Two of its CPU paths are not taken. A block that is not full it divides by its largest,
    where its CUDA kernel multiplies by the reciprocal as everywhere: zeros fill it up here,
    which changes nothing else. Codes of scales it looks up in a table of 65,536 entries, off
    in some, near zero by several, where the CUDA kernel takes the nearest: its generic path,
    which it takes for doubles, does too. The offset is ours, after it was found to be the mean of the scales but
    for the order of summing; the scales themselves are not in the file, only their codes."""
    values = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64))
    codes, plain = bitsandbytes.functional.quantize_4bit(
        values, blocksize=64, compress_statistics=False, quant_type="nf4")
    codes = codes.flatten()[: -(-weight.numel() // 2)]
    assert packed.numel() == codes.numel() and state.absmax.numel() == plain.absmax.numel()
    offset, nested = state.offset, state.state2
    assert torch.isclose(offset.double(), plain.absmax.double().mean(), rtol=2e-7, atol=0)
    shifted = plain.absmax - offset
    nearest, largest = torch.ops.bitsandbytes.quantize_blockwise.default(shifted.double(), nested.code.double(), 256)
    looked_up, _ = torch.ops.bitsandbytes.quantize_blockwise.default(shifted, nested.code, 256)
    wrong = (packed.flatten() != codes).sum() + (state.absmax != nearest).sum() + (nested.absmax != largest).sum()
    return int(wrong), int((state.absmax != looked_up).sum())


def main():
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else random.randrange(10**6)
    torch.manual_seed(seed)
    compared, wrong, looked_up, worst_logit = 0, 0, 0, 0.0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        for number, (tied, hidden, intermediate) in enumerate(SHAPES):
            config = Qwen3Config(
                vocab_size=320, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, head_dim=32, max_position_embeddings=128, tie_word_embeddings=tied,
                bos_token_id=None, eos_token_id=1, initializer_range=0.1)
            source, folder, adapter = (scratch / f"{name}-{number}" for name in ("source", "quantized", "adapter"))
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
                weight = stored.get_submodule(name).weight.data
                some, others = differing(state, module.weight.data, weight)
                wrong, looked_up, compared = wrong + some, looked_up + others, compared + weight.numel()
                state.dtype = module.compute_dtype = torch.float32
                module.support_avx512bf16_for_cpu = False  # whose products are rounded to bf16
            assert quantised == 3 * 7
            if hidden % 64 or intermediate % 64:
                continue
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
                      "seed": seed, "compared": compared, "codes_differing": wrong, "differing_from_cpu_lookup": looked_up, "logit_difference": worst_logit, "passed": passed}))
    sys.exit(not passed)


if __name__ == "__main__":
    main()
