"""The weights of a GGUF file as a model folder, dequantized once."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from kv_transition.data import gguf, gguf_tokenizer
from kv_transition.errors import UserError


def model_folder(name: str, dtype: str) -> Path:
    """Return the folder of the dequantized model in ``dtype``; create it if needed.

    Raises UserError as `header` does, and for an architecture that transformers cannot read from GGUF.
    """
    return gguf.made(name, dtype, lambda folder: _write_model(name, dtype, folder))


def _write_model(name: str, dtype: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    gguf.header(name)  # raises if the file is damaged
    if importlib.util.find_spec("accelerate") is None:  # transformers needs it to read GGUF
        raise UserError(
            f"model.name: {name} needs the package accelerate, which is not installed; "
            "pip install '.[gguf]' installs it"
        )
    file = gguf.gguf_file(name)
    with gguf_tokenizer.without_progress_bars():
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                str(file.parent),
                gguf_file=file.name,
                dtype=getattr(torch, dtype),
                output_loading_info=True,
                trust_remote_code=False,
            )
        except (ValueError, KeyError, NotImplementedError, RuntimeError, OSError) as error:
            raise gguf.unreadable(name, error) from None
        if missing := sorted(found["missing_keys"]):
            raise UserError(f"model.name: {name} lacks {len(missing)} weights, such as {missing[0]}; download it again")
        # the weights are dequantized, and transformers does not save a model with a quantization config
        del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(folder)
