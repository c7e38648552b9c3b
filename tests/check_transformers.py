#!/usr/bin/env python3
"""Do transformers and dsv3.h agree about a checkpoint that `dsv3 train` or `dsv3 convert` has written?

    python3 tests/check_transformers.py DIR [--tokens N]

Loads DIR with transformers (AutoModelForCausalLM, float32; FP8 files are decoded by their block scales first), runs N
tokens through it, writes tokens, logits and hidden states as DIR/golden.safetensors and lets build/parity compare them
with dsv3.h. Needs torch, transformers and safetensors; `make check` does not call it.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile

import torch
import transformers
from safetensors.torch import load_file, save_file

parser = argparse.ArgumentParser()
parser.add_argument("dir")
parser.add_argument("--tokens", type=int, default=96)
parser.add_argument("--parity", default="build/parity")
args = parser.parse_args()


def decoded(directory):
    """The directory itself, or a copy whose FP8 blocks are float32."""
    weights = load_file(os.path.join(directory, "model.safetensors"))
    scales = {name[: -len("_scale_inv")]: t for name, t in weights.items() if name.endswith("_scale_inv")}
    if not scales:
        return directory
    plain = {}
    for name, w in weights.items():
        if name.endswith("_scale_inv"):
            continue
        if name in scales:
            s = scales[name].repeat_interleave(128, 0)[: w.shape[0]].repeat_interleave(128, 1)[:, : w.shape[1]]
            w = w.float() * s
        plain[name] = w.float().contiguous()
    copy = tempfile.mkdtemp()
    save_file(plain, os.path.join(copy, "model.safetensors"), metadata={"format": "pt"})
    with open(os.path.join(directory, "config.json")) as f:
        config = json.load(f)
    config.pop("quantization_config", None)
    with open(os.path.join(copy, "config.json"), "w") as f:
        json.dump(config, f)
    return copy


source = decoded(args.dir)
model, info = transformers.AutoModelForCausalLM.from_pretrained(
    source, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
)
if info["missing_keys"] or info["mismatched_keys"]:
    sys.exit(f"{args.dir}: missing {info['missing_keys']}, mismatched {info['mismatched_keys']}")
model.eval()
generator = torch.Generator().manual_seed(1)
tokens = torch.randint(0, model.config.vocab_size, (1, args.tokens), generator=generator)
with torch.no_grad():
    logits = model(tokens).logits
with tempfile.TemporaryDirectory() as work:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(os.path.join(args.dir, name), work)
    save_file(
        {"tokens": tokens.to(torch.int32), "logits": logits.float().contiguous()},
        os.path.join(work, "golden.safetensors"),
    )
    print(f"{args.dir}: {type(model).__name__}, transformers {transformers.__version__}, torch {torch.__version__}")
    sys.exit(subprocess.run([args.parity, work]).returncode)
