"""The GGUF file that `qlora-train merge --gguf` writes, read by others.

python live.py [SEED]: prints one JSON line; exit 1 where something differs. A random Qwen3
with heads of 128 features (transformers assumes them in a GGUF file) and a random adapter
are merged into both forms. By the package `gguf`: every key is one that it knows, with the
value that the other form has, and so is every tensor, bit for bit. By transformers: ids,
rendered chats and logits are the same in both. Then copies of the file are spoilt, and each
must be found out. qlora-train is taken from the PATH. llama.cpp itself is not run.
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
from gguf import Keys, TokenType
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
DEMO = pathlib.Path(__file__).parents[2] / "demo/model"
LAYERS = 2
# Sums of four products in another order land on the other side of a rounding to float16:
# over seeds 1 to 5 in 5 to 17 of 3,739,136 values (2026-11-30). PART is four times the worst.
PART = 2e-5
TEXTS = ["Rain again, and no umbrella 🌂", "<|im_start|>user\nTea?<|im_end|>\n", "naïve   spaces\n\nשלום"]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tea?"}]


def spoilt(content):
    """Copies of the file, each with one thing in it that is wrong."""
    name, key = b"blk.1.attn_k_norm.weight", b"qwen3.rope.freq_base"
    architecture, token = b"\x05\0\0\0\0\0\0\0qwen3", b"\x0a\0\0\0\0\0\0\0<|im_end|>"
    for before, after in [(name, b"blk.1.attn_x_norm.weight"), (name, b"blk.0.attn_k_norm.weight"), (key, b"qwen3.rope.freq_bass"),
                          (b"qwen3.attention.key_length", b"qwen3.attention.kex_length"), (architecture, architecture[:-1] + b"2"),
                          (b"tokenizer.ggml.merges", b"tokenizer.ggml.mergex"), (token, token.replace(b"end", b"eng"))]:
        assert content.count(before) == 1
        yield after.decode(), content.replace(before, after)
    value = len(content) - 1000
    yield "a value", content[:value] + bytes([content[value] ^ 1]) + content[value + 1 :]


def names(holder):
    """The keys that the package knows."""
    for value in vars(holder).values():
        if isinstance(value, type):
            yield from names(value)
        elif isinstance(value, str):
            yield value.replace("{arch}", "qwen3")


def tensors(reader):
    values = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return {name: torch.from_numpy(np.array(value, dtype=np.float32)) for name, value in values.items()}


def called(name):
    """What the package calls a tensor of a checkpoint."""
    stem, kind = name.rsplit(".", 1)
    return f"{gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, LAYERS).get_name(stem)}.{kind}"


def differences(folder, file):
    """How the two forms differ."""
    reader, config, ours = gguf.GGUFReader(file), AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    found = [f"no such key: {key}" for key in fields.keys() - set(names(Keys))]
    tokens = [ours.convert_ids_to_tokens(i) for i in range(len(ours))]
    want = {
        Keys.General.ARCHITECTURE: "qwen3", Keys.General.FILE_TYPE: gguf.LlamaFileType.MOSTLY_BF16,
        Keys.LLM.BLOCK_COUNT: LAYERS, Keys.LLM.CONTEXT_LENGTH: config.max_position_embeddings,
        Keys.LLM.EMBEDDING_LENGTH: config.hidden_size, Keys.LLM.FEED_FORWARD_LENGTH: config.intermediate_size,
        Keys.Attention.HEAD_COUNT: config.num_attention_heads, Keys.Attention.HEAD_COUNT_KV: config.num_key_value_heads,
        Keys.Attention.KEY_LENGTH: config.head_dim, Keys.Attention.VALUE_LENGTH: config.head_dim,
        Keys.Attention.LAYERNORM_RMS_EPS: np.float32(config.rms_norm_eps),
        Keys.Rope.FREQ_BASE: np.float32(config.rope_parameters["rope_theta"]),
        Keys.Tokenizer.MODEL: "gpt2", Keys.Tokenizer.PRE: "qwen2", Keys.Tokenizer.EOS_ID: ours.eos_token_id,
    }
    for key, value in want.items():
        key = key.replace("{arch}", "qwen3")
        if fields.get(key) != value:
            found.append(f"{key} is {fields.get(key)}, not {value}")
    listed, types = fields[Keys.Tokenizer.LIST], fields[Keys.Tokenizer.TOKEN_TYPE]
    if listed[: len(tokens)] != tokens or not len(listed) == len(set(listed)) == len(types) == config.vocab_size:
        found.append("other tokens")
    added = ours.added_tokens_decoder
    kinds = [TokenType.UNUSED if i >= len(tokens) else TokenType.NORMAL if i not in added else TokenType.CONTROL for i in range(len(types))]
    # Those that are not special may be either, as in llama.cpp's converter.
    if any(a != b for i, (a, b) in enumerate(zip(types, kinds)) if i not in added or added[i].special):
        found.append("other types of tokens")

    stored, read = {called(name): tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}, tensors(reader)
    if stored.keys() != read.keys() or len(reader.tensors) != len(read):
        found.append(f"other names: {sorted(stored.keys() ^ read.keys())}")
    found += [f"{name} differs" for name in sorted(stored.keys() & read.keys()) if not torch.equal(stored[name], read[name])]

    other = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in TEXTS:
        if ours(text)["input_ids"] != other(text)["input_ids"]:
            found.append(f"other ids for {text!r}: {ours(text)['input_ids']} {other(text)['input_ids']}")
    if ours.apply_chat_template(CHAT, tokenize=False) != other.apply_chat_template(CHAT, tokenize=False):
        found.append("another chat")
    ids = torch.randint(0, config.vocab_size, (1, 40))
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **more)(input_ids=ids).logits
                  for where, more in ((folder, {}), (file.parent, {"gguf_file": file.name}))]
    if not torch.equal(*logits):
        found.append(f"logits differ by {(logits[0] - logits[1]).abs().max().item():e}")
    return found


def noticed(folder, file, content):
    """Whether a file is found out."""
    file.write_bytes(content)
    try:
        return bool(differences(folder, file))
    except Exception:  # no reader takes it
        return True


def merge(*arguments):
    run = subprocess.run(["qlora-train", "merge", *map(str, arguments), "--quiet"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def main():
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else random.randrange(10**6)
    torch.manual_seed(seed)
    failures, count, tried, halves_off, halves = [], 0, 0, 0, 0
    demo = json.loads((DEMO / "config.json").read_text())
    for tied in (False, True):
        with tempfile.TemporaryDirectory() as scratch:
            base, adapter, merged, file, half = (pathlib.Path(scratch) / name for name in ("base", "adapter", "merged", "bf16.gguf", "f16.gguf"))
            Qwen3ForCausalLM(Qwen3Config(
                vocab_size=demo["vocab_size"], hidden_size=256, intermediate_size=320, num_hidden_layers=LAYERS,
                num_attention_heads=4, num_key_value_heads=2, head_dim=128, max_position_embeddings=256, rms_norm_eps=1e-3, rope_theta=5e4,
                tie_word_embeddings=tied, initializer_range=0.1, bos_token_id=None, eos_token_id=demo["eos_token_id"],
            )).to(torch.bfloat16).save_pretrained(base)
            for path in DEMO.iterdir():  # tokenizer, template, generation_config.json
                if path.suffix in (".json", ".jinja", ".txt") and not (base / path.name).exists():
                    shutil.copy(path, base)
            adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), peft.LoraConfig(
                r=4, target_modules=["q_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM"))
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.uniform_(parameter, -0.05, 0.05)
            adapted.save_pretrained(adapter)
            merge("--model", base, "--adapter", adapter, "--out", merged, "--gguf", file)
            failures += differences(merged, file)
            count += len(gguf.GGUFReader(file).tensors)
            for what, content in spoilt(file.read_bytes()):
                tried += 1
                if not noticed(merged, file, content):
                    failures.append(f"spoilt, and not noticed: {what}")

            # In f16 there is no other form: peft merges in f32 and rounds once, as ours.
            merge("--model", base, "--adapter", adapter, "--gguf", half, "--gguf-type", "f16")
            whole = adapted.merge_and_unload().state_dict()
            want = {called(name): value if value.dim() == 1 else value.half().float() for name, value in whole.items()}
            read = tensors(gguf.GGUFReader(half))
            if tied:
                want.pop("output.weight")
            if read.keys() != want.keys():
                failures.append(f"f16: other names: {sorted(read.keys() ^ want.keys())}")
            halves_off += sum(int((read[name] != want[name]).sum()) for name in read.keys() & want.keys())
            halves += sum(value.numel() for value in want.values())
    if halves_off > PART * halves:
        failures.append(f"f16: {halves_off} of {halves} values differ from peft's")
    print(json.dumps({"check": "gguf", "gguf": importlib.metadata.version("gguf"), "transformers": transformers.__version__, "seed": seed,
                      "tensors": count, "spoilt": tried, "f16_differing": halves_off, "of": halves, "failures": failures}))
    sys.exit(bool(failures))


main()
