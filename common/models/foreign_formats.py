"""Directories that hold a model in another format than Hugging Face's with safetensors, and what to do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

# File names of a format, as patterns, and what a message says of them. The first that fits is told.
_FORMATS: Final = (
    ("*.gguf", "a GGUF file, which is not supported: use the model's safetensors"),
    ("adapter_config.json", "of an adapter (LoRA), which is not supported: merge it into its base model"),
    ("adapter_model.*", "of an adapter (LoRA), which is not supported: merge it into its base model"),
    ("params.json", "of the makers' own format, which is not supported: use the one for transformers"),
    ("consolidated*", "of the makers' own format, which is not supported: use the one for transformers"),
    ("pytorch_model*.bin", "a pickle, which is not read: save the model as safetensors"),
    ("*.bin", "no safetensors file: save the model as safetensors"),
    ("*.pt", "a pickle, which is not read: save the model as safetensors"),
    ("*.pth", "a pickle, which is not read: save the model as safetensors"),
    ("tf_model.h5", "of TensorFlow, which is not supported: save the model as safetensors"),
    ("flax_model.msgpack", "of Flax, which is not supported: save the model as safetensors"),
    ("*.onnx", "of ONNX, which is not supported: use the model's safetensors"),
)


def foreign_format(model_dir: Path) -> str | None:
    """What the directory holds instead, in words; None if nothing is known of it."""
    for pattern, said in _FORMATS:
        if found := sorted(path.name for path in model_dir.glob(pattern)):
            return f"{found[0]} is {said}"
    return None


def holds_foreign_weights(model_dir: Path) -> bool:
    """Whether some file of another format may hold weights. Those in JSON (`params.json`, an index) only describe."""
    return any(path.suffix != ".json" for pattern, _ in _FORMATS for path in model_dir.glob(pattern))


def adapter_file(model_dir: Path) -> Path | None:
    """The configuration of an adapter that lies in the directory; transformers may load its base model instead."""
    path = model_dir / "adapter_config.json"
    return path if path.exists() else None
