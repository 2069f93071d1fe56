"""Commands that messages name, which bring a model into a form that can be merged. Tests run each of them."""

from __future__ import annotations

from engine.checkpoints.adapter_file import AdapterFile
from engine.checkpoints.headers import ModelHeader


def merge_with_peft(file: AdapterFile, rows: int | None = None) -> str:
    """Return a command that merges an adapter into its base and writes a full checkpoint beside the adapter.

    `rows` is the number of tokens to which the embedding was resized for the training, if it was.
    """
    trained_on = file.config.get("base_model_name_or_path")
    if file.base.takes_images and isinstance(trained_on, str) and not any(map(_in_multimodal, file.tensors)):
        # Under the names of a text model, peft would find no module of a multimodal model, and change nothing.
        model = f"t.AutoModelForCausalLM.from_pretrained({trained_on!r})"
    else:
        model = _load(file.base)
    adapter, out = str(file.folder), f"{file.folder}-merged"
    resize, tokenizer = f"m.resize_token_embeddings({rows}); " if rows else "", ""
    if rows and (file.folder / "tokenizer_config.json").exists():
        tokenizer = f"; t.AutoTokenizer.from_pretrained({adapter!r}).save_pretrained({out!r})"
    return (
        f'python -c "import peft, transformers as t; m = {model}; {resize}'
        f'peft.PeftModel.from_pretrained(m, {adapter!r}).merge_and_unload().save_pretrained({out!r}){tokenizer}"'
    )


def untie(base: ModelHeader) -> str:
    """Return a command that writes a copy of a base beside it, whose embedding and head are two tensors."""
    return (
        f'python -c "import torch, transformers as t; m = {_load(base)}; '
        "[setattr(c, 'tie_word_embeddings', False) for c in (m.config, m.config.get_text_config())]; "
        "h = m.get_output_embeddings(); h.weight = torch.nn.Parameter(h.weight.detach().clone()); "
        f'm.save_pretrained({f"{base.folder}-untied"!r})"'
    )


def _load(base: ModelHeader) -> str:
    kind = "ImageTextToText" if base.takes_images else "CausalLM"
    return f"t.AutoModelFor{kind}.from_pretrained({str(base.folder)!r})"


def _in_multimodal(name: str) -> bool:
    return "language_model" in name or "visual" in name or "vision" in name
