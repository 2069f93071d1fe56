"""Write the inputs of the benchmarks: a random Llama, K experts of it, calibration files, a merge.yaml.

An expert is the base plus seeded noise on every float tensor. The output head has no noise by default: most fine-tunes
leave it unchanged, which keeps targets small (docs/architecture.md, law 7). Models are written once for each size and
dtype, one in memory at a time, and kept below `--workdir`; a folder with its final name is complete. As a script, the
module writes the models and prints their description.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
import transformers
import yaml
from report import console
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

transformers.utils.logging.disable_progress_bar()

WORKDIR = Path(tempfile.gettempdir()) / "expert-merging-benchmarks"
NOISE = 1e-3
FIRST_TOKEN = 3  # lower ids are special tokens
# Parts of a Llama that the learned methods exclude by default.
NOT_MERGED = ("norm", "embed_tokens", "lm_head")


@dataclass(frozen=True)
class Size:
    """Options of a `LlamaConfig`."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    vocab_size: int
    tie_word_embeddings: bool = True


SIZES = {
    "tiny": Size(128, 4, 352, 4, 1024),
    "small": Size(256, 4, 704, 4, 2048),
    # More than 50 million parameters in the merged tensors alone.
    "standard": Size(768, 8, 1792, 12, 8192),
}


@dataclass(frozen=True)
class Models:
    """A base and its experts, each written when it is first used."""

    workdir: Path
    size: str = "standard"
    dtype: str = "float32"
    own_heads: bool = False

    @property
    def shape(self) -> Size:
        return SIZES[self.size]

    @property
    def folder(self) -> Path:
        # The digest covers everything that decides the weights, so that a changed size gets a new folder.
        facts = {**asdict(self.shape), "dtype": self.dtype, "own_heads": self.own_heads, "noise": NOISE}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
        return self.workdir / f"{self.size}-{self.dtype}-{digest}"

    def base(self) -> Path:
        return once(self.folder / "base", self._write_base)

    def expert(self, index: int) -> Path:
        return once(self.folder / f"expert{index:03}", lambda folder: self._write_expert(folder, index))

    def calibration(self, index: int, samples: int, tokens: int) -> Path:
        """Return a file of `samples` records of exactly `tokens` random tokens."""

        def write(path: Path) -> None:
            generator = torch.Generator().manual_seed(index)
            ids = torch.randint(FIRST_TOKEN, self.shape.vocab_size, (samples, tokens), generator=generator)
            path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids.tolist()))

        return once(self.folder / "calibration" / f"expert{index:03}-{samples}x{tokens}.jsonl", write)

    def write_merge(
        self, path: Path, experts: int, samples: int, tokens: int, parameters: Mapping[str, Any] | None = None
    ) -> Path:
        """Write a merge.yaml of the first `experts` experts by Expert Merging (stage 1 only), with `parameters`."""
        entries = [
            {"model": str(self.expert(k)), "calibration": str(self.calibration(k, samples, tokens))}
            for k in range(experts)
        ]
        config = {
            "merge_method": "expert_merging",
            "preset": "paper",
            "base_model": str(self.base()),
            "models": entries,
            "parameters": {"samples_per_model": samples, **(parameters or {})},
        }
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    def elements(self) -> dict[str, int]:
        """Return the number of elements of each of the base's tensors."""
        with safe_open(self.base() / "model.safetensors", framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
        return {name: int(torch.Size(shape).numel()) for name, shape in shapes.items()}

    def describe(self) -> dict[str, Any]:
        """Return the facts of the models for a report's settings."""
        elements = self.elements()
        merged = sum(count for name, count in elements.items() if not any(part in name for part in NOT_MERGED))
        return {
            "size": self.size,
            "dtype": self.dtype,
            "own_heads": self.own_heads,
            "parameters": sum(elements.values()),
            "merged_parameters": merged,
            "vocabulary": self.shape.vocab_size,
        }

    def _write_base(self, folder: Path) -> None:
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                **asdict(self.shape),
                num_key_value_heads=self.shape.num_attention_heads,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
        )
        model.to(getattr(torch, self.dtype)).save_pretrained(folder, max_shard_size="1TB")

    def _write_expert(self, folder: Path, index: int) -> None:
        head = () if self.own_heads else ("lm_head", "embed_tokens" if self.shape.tie_word_embeddings else "lm_head")
        generator = torch.Generator().manual_seed(index + 1)
        base, tensors = self.base(), {}
        with safe_open(base / "model.safetensors", framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not any(part in name for part in head):
                    noise = torch.randn(tensor.shape, generator=generator).mul_(NOISE)
                    tensor = noise.add_(tensor).to(tensor.dtype)
                tensors[name] = tensor
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        for companion in base.glob("*.json"):
            shutil.copy(companion, folder)


def once(path: Path, write: Callable[[Path], None]) -> Path:
    """Return `path`, writing it under another name and renaming it if it does not exist."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        if part.is_dir():
            shutil.rmtree(part)
        write(part)
        part.rename(path)
    return path


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the command line options that choose the models: --size, --dtype, --own-heads, --workdir."""
    for option in (
        click.option(
            "--workdir",
            default=WORKDIR,
            show_default=True,
            type=click.Path(path_type=Path),
            help="Folder of models and results.",
        ),
        click.option("--own-heads", is_flag=True, help="Add noise to the experts' output heads as well."),
        click.option(
            "--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16", "float16"])
        ),
        click.option("--size", default="standard", show_default=True, type=click.Choice(list(SIZES))),
    ):
        command = option(command)
    return command


@click.command(help=__doc__)
@options
@click.option("--experts", default=2, show_default=True, type=click.IntRange(min=1))
def main(workdir: Path, size: str, dtype: str, own_heads: bool, experts: int) -> None:
    models = Models(workdir.absolute(), size, dtype, own_heads)
    for index in range(experts):
        models.expert(index)
    console.print(models.folder, models.describe())


if __name__ == "__main__":
    main()
