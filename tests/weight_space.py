"""Weight-space merges without Ray: by shards as plain objects, and by mergekit from the same YAML."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import yaml
from conftest import plan_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.shard import Shard
from engine.output.model_folder import output_files
from engine.planning.open_models import open_base, open_expert
from engine.planning.plan import Plan, slices
from engine.shards.prepasses import Known, known_of
from engine.storage.local_folder import LocalFolder

Tensors = dict[str, Tensor]
# The marks of tests that also run mergekit.
BESIDE_MERGEKIT = [
    pytest.mark.usefixtures("one_thread"),
    # mergekit's pickle reader uses the deprecated module numpy.core.
    pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning"),
]
_numbers = count()


def write_config(folder: Path, **keys: Any) -> Path:
    """Write a new YAML to the folder, with absolute paths of its models, readable by both libraries."""

    def located(value: Any, key: str = "") -> Any:
        if key in ("model", "base_model"):
            return "+".join(str(folder / part) for part in value.split("+"))
        if isinstance(value, list):
            return [located(one) for one in value]
        return {one: located(own, one) for one, own in value.items()} if isinstance(value, dict) else value

    path = folder / f"merge{next(_numbers)}.yaml"
    path.write_text(yaml.safe_dump(located(keys), sort_keys=False), encoding="utf-8")
    return path


def entries(*parameters: Mapping[str, Any], first: int = 0) -> list[dict[str, Any]]:
    """Return `models` of a YAML: expert0, expert1, … with the given parameters."""
    return [{"model": f"expert{k}", "parameters": dict(mine)} for k, mine in enumerate(parameters, first)]


def ours(config: Path, shards: int = 1, only: int | None = None) -> Tensors:
    """Return the tensors of this engine's merge."""
    plan = plan_of(config)
    return read(combine(plan, config.with_suffix(f".ours{only}"), shards, only))


def combine(plan: Plan, folder: Path, shards: int = 1, only: int | None = None) -> Path:
    """Write every file of the output, distributed over the shards in turn."""
    folder.mkdir()
    workers = [Shard(plan, index) for index in range(shards)]
    found = known(plan, workers)
    for index, file in enumerate(output_files(plan)):
        workers[index % shards].combine(LocalFolder(folder), file, found, only)
    return folder


def known(plan: Plan, workers: Sequence[Shard]) -> Known:
    """Return the results of the prepasses, measured by the shards as for the driver."""

    def measure(method: str, index: int, names: Sequence[str], so_far: Known) -> list[dict[str, Any]]:
        owned = zip(workers, slices(plan, len(workers), names), strict=True)
        return [worker.measure(method, index, mine, so_far) for worker, mine in owned if mine]

    return known_of(plan, measure)


def mergekits(config: Path, **options: Any) -> Tensors:
    """Return the tensors of mergekit's merge of the YAML, on the CPU."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    folder = config.with_suffix(".mergekit")
    run_merge(
        MergeConfiguration.model_validate(yaml.safe_load(config.read_text(encoding="utf-8"))),
        str(folder),
        MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False, device="cpu", **options),
    )
    return read(folder)


def read(folder: Path) -> Tensors:
    """Read all tensors of a folder's files."""
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def task_vectors(plan: Plan) -> dict[str, list[Tensor]]:
    """Return τₖ of every tensor, dense, by subtraction of the stored tensors in float32."""
    base = open_base(plan)
    experts = [open_expert(expert, base) for expert in plan.experts]
    found = {}
    for name in plan.merged:
        own = base.read(name).float()
        stored = [expert.stored(name) for expert in experts]
        found[name] = [torch.zeros_like(own) if one is None else one.float().view(own.shape) - own for one in stored]
    return found


def make_models(
    folder: Path,
    family: str = "llama",
    experts: int = 3,
    tied: bool = False,
    sharded: bool = False,
    dtype: torch.dtype = torch.float32,
    layers: int = 3,
) -> Path:
    """Save a base and experts expert0, expert1, … that differ from it in every tensor, including head and embedding."""
    with _layers(layers):
        base = tiny.make_model(family, tied)
        with torch.no_grad():
            for seed, parameter in enumerate(base.parameters()):
                if parameter.dim() < 2:
                    # Norms of ones and biases of zeros would hide errors in them.
                    parameter.add_(noise(parameter.shape, 1000 + seed, 0.1))
        tiny.save(base, folder / "base", dtype, sharded)
        for k in range(experts):
            expert = tiny.make_expert(base, seed=k + 1)
            with torch.no_grad():
                for seed, module in enumerate((expert.get_input_embeddings(), expert.get_output_embeddings())):
                    if seed == 0 or not tied:
                        module.weight.add_(noise(module.weight.shape, 10 * k + seed, 0.05))
            tiny.save(expert, folder / f"expert{k}", dtype, sharded)
    return folder


class _layers:
    def __init__(self, count: int) -> None:
        self._count, self._before = count, tiny.COMMON["num_hidden_layers"]

    def __enter__(self) -> None:
        tiny.COMMON["num_hidden_layers"] = self._count

    def __exit__(self, *error: object) -> None:
        tiny.COMMON["num_hidden_layers"] = self._before


VOCABULARY = 19
# Tall, wide and square matrices. The other tensors are not matrices to the matrix methods, or have one row per token.
MATRICES = {"layers.0.high.weight": (17, 11), "layers.0.wide.weight": (9, 23), "layers.1.square.weight": (12, 12)}
OTHERS = {
    "embed_tokens.weight": (VOCABULARY, 7),
    "lm_head.weight": (VOCABULARY, 7),
    "layers.0.norm.weight": (13,),
    "layers.1.conv.weight": (3, 4, 5),
    "layers.1.row.weight": (1, 9),
    "layers.1.scale": (),
}
SHAPES: dict[str, tuple[int, ...]] = MATRICES | OTHERS


def write_checkpoint(folder: Path, tensors: Tensors) -> Path:
    """Write a model folder with the given tensors."""
    folder.mkdir(parents=True)
    config = {"architectures": ["Any"], "model_type": "any", "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def write_arrays(
    folder: Path,
    experts: int = 3,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    scale: float = 0.05,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
) -> tuple[Tensors, list[Tensors]]:
    """Write a base and experts with tensors of `shapes`, and return their tensors.

    `dtypes` are those of the base and of each expert; the last one applies to all that follow.
    """
    kinds = [*dtypes, *[dtypes[-1]] * (experts + 1 - len(dtypes))]
    base = {name: noise(shape, seed, 0.3) for seed, (name, shape) in enumerate(shapes.items())}
    written = [{name: tensor.to(kinds[0]) for name, tensor in base.items()}]
    for k in range(experts):
        own = {
            name: (tensor + _falling(noise(shapes[name], 100 * (k + 1) + seed, scale))).to(kinds[k + 1])
            for seed, (name, tensor) in enumerate(base.items())
        }
        written.append(own)
    for name, tensors in zip(("base", *(f"expert{k}" for k in range(experts))), written, strict=True):
        write_checkpoint(folder / name, tensors)
    return written[0], written[1:]


def _falling(tensor: Tensor) -> Tensor:
    """Scale the columns of a matrix by falling factors, so that its singular values are well separated.

    A cut between two of them is then well defined.
    """
    return tensor * 0.85 ** torch.arange(tensor.shape[1]) if tensor.dim() == 2 else tensor


def noise(shape: Sequence[int], seed: int, scale: float = 1.0) -> Tensor:
    """Return normally distributed numbers."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) * scale


def worst(found: Tensors, expected: Tensors) -> float:
    """Return the largest difference of any element, after checking that names, shapes and dtypes are equal."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype, name
    return max(difference(found[name], tensor) for name, tensor in expected.items())


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two tensors' elements."""
    return (found.double() - expected.double()).abs().max().item()


@contextmanager
def configs_read_once() -> Iterator[None]:
    """Make mergekit read the config.json of a folder once, and not ten times a merge. It gets a copy each time."""
    import mergekit.common

    read_config = cache(mergekit.common.AutoConfig.from_pretrained)

    def from_pretrained(path: str, **options: Any) -> Any:
        return deepcopy(read_config(path, **options))

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(mergekit.common, "AutoConfig", SimpleNamespace(from_pretrained=from_pretrained))
        yield
