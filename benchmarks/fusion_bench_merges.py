"""Merge the models of `fusion_bench_parity.py` by FusionBench; run by the Python of an environment that has it.

The folder has `base`, `expert000`, …, `statistics.safetensors` and `settings.json`; each merge is written to
`theirs/NAME.safetensors`. FusionBench's own classes and functions merge, with what they lack for a Llama: its Fisher
information and Gram matrices are given, and RegMean++ is told where the blocks of a Llama are.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fusion_bench import BaseModelPool
from fusion_bench.method.doge_ta.doge_ta import DOGE_TA_Algorithm
from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
from fusion_bench.method.isotropic_merging.iso import IsotropicMergingInCommonSubspace
from fusion_bench.method.model_stock.model_stock import ModelStock
from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
from fusion_bench.method.regmean_plusplus.clip_regmean_plusplus import RegMeanAlgorithmForCLIPPlusPlus
from fusion_bench.method.regmean_plusplus.regmean_plusplus import RegMeanAlgorithmPlusPlus
from fusion_bench.method.simple_average import SimpleAverageAlgorithm
from fusion_bench.method.singular_value_calibration import SingularValueCalibrationArithmeticTask
from fusion_bench.method.slerp.slerp import SlerpMergeAlgorithm
from fusion_bench.method.task_arithmetic.task_arithmetic import TaskArithmeticAlgorithm
from fusion_bench.method.task_singular_vector.TSVM import TaskSingularVectorMerging
from fusion_bench.method.ties_merging.ties_merging import TiesMergingAlgorithm
from fusion_bench.method.wudi.wudi import WUDIMerging
from fusion_bench.mixins import LightningFabricMixin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

Tensors = dict[str, Tensor]
# DOGE of FusionBench merges the weights whose names contain this.
ENCODER = "encoder."


def module(tensors: Tensors, prefix: str = "") -> nn.Module:
    """Return a module with these parameters, under their names."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = f"{prefix}{name}".split(".")
        at = root
        for part in path:
            if part not in dict(at.named_children()):
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.register_parameter(last, nn.Parameter(tensor.clone()))
    return root


class LlamaRegMean(LightningFabricMixin, RegMeanAlgorithmPlusPlus):  # type: ignore[misc]
    """RegMean++ of FusionBench on the blocks of a Llama, from given tokens."""

    get_regmean_weights = RegMeanAlgorithmForCLIPPlusPlus.get_regmean_weights

    def merge_embedding_layer(self, models_to_merge_dict: dict[str, nn.Module]) -> Tensors:
        self.rotary = next(iter(models_to_merge_dict.values())).model.rotary_emb
        weights = [model.model.embed_tokens.weight for model in models_to_merge_dict.values()]
        return {"model.embed_tokens.weight": torch.stack(weights).mean(dim=0)}

    def get_input_for_first_layer(self, model: nn.Module, train_dataset: Any) -> list[Tensor]:
        return [model.model.embed_tokens(torch.tensor([ids])).detach() for ids in train_dataset]

    def get_layers(self, model: nn.Module) -> Any:
        return model.model.layers

    def layer_batches_forward(self, layer: nn.Module, batches_input: list[Tensor]) -> list[Tensor]:
        found = []
        for hidden in batches_input:
            places = torch.arange(hidden.shape[1])[None]
            cos_sin = self.rotary(hidden, places)
            found.append(layer(hidden, attention_mask=None, position_ids=places, position_embeddings=cos_sin).detach())
        return found

    def update_merged_params_dict(self, merged_params_dict: Tensors, new_merged_params: Tensors, layer_idx: int) -> Any:
        return merged_params_dict | {f"model.layers.{layer_idx}.{name}": at for name, at in new_merged_params.items()}


class Pool(BaseModelPool):  # type: ignore[misc]
    """Models in memory, and the tokens of each one's samples."""

    def __init__(self, models: dict[str, nn.Module], samples: dict[str, list[list[int]]]) -> None:
        super().__init__(models)
        self.samples = samples

    def load_train_dataset(self, name: str, *_: Any, **__: Any) -> list[list[int]]:
        return self.samples[name]


def of_statistics(statistics: Tensors, kind: str, experts: int) -> list[Tensors]:
    starts = [f"{kind}.{k}." for k in range(experts)]
    return [
        {name.removeprefix(start): tensor for name, tensor in statistics.items() if name.startswith(start)}
        for start in starts
    ]


def main(folder: Path) -> None:
    settings = json.loads((folder / "settings.json").read_text())
    count, own = settings["experts"], settings["options"]
    paths = [folder / "base", *(folder / f"expert{k:03}" for k in range(count))]
    base, *experts = (load_file(path / "model.safetensors") for path in paths)
    statistics = load_file(folder / "statistics.safetensors")
    matrices = [name for name, tensor in base.items() if tensor.dim() == 2 and "embed_tokens" not in name]
    others = [name for name in base if name not in matrices and base[name].dim() == 2]
    names = ["_pretrained_", *(f"expert{k}" for k in range(count))]

    def pool(prefix: str = "", keys: list[str] | None = None, models: int = count) -> BaseModelPool:
        chosen = [{name: tensors[name] for name in keys or base} for tensors in (base, *experts[:models])]
        return BaseModelPool({name: module(tensors, prefix) for name, tensors in zip(names, chosen, strict=False)})

    def given(kind: str, keys: list[str]) -> tuple[dict[str, list[Tensor]], list[Tensors]]:
        return {name: [tensors[name] for tensors in experts] for name in keys}, of_statistics(statistics, kind, count)

    def fisher(floor: float) -> Tensors:
        of = of_statistics(statistics, "fisher", count)
        params, weights = given("fisher", [name for name in base if all(name in one for one in of)])
        found: Tensors = merging_with_fisher_weights(params, weights, torch.ones(count) / count, True, floor)
        return found

    def regmean() -> Tensors:
        params, weights = given("gram", list(base))
        found: Tensors = merging_with_regmean_weights(params, weights, own["regmean"]["alpha"])
        return found

    def regmean_plus_plus() -> nn.Module:
        samples = dict(zip(names[1:], settings["samples"], strict=True))
        models = {name: LlamaForCausalLM.from_pretrained(path) for name, path in zip(names, paths, strict=True)}
        ratio = own["regmean_plus_plus"]["alpha"]
        options = {"num_regmean_examples": 0, "exclude_param_names_regex": [], "weight_transpose": True}
        return LlamaRegMean(reduce_non_diagonal_ratio=ratio, **options).run(Pool(models, samples))

    def doge() -> Tensors:
        options = own["doge"]
        found = DOGE_TA_Algorithm(options["subspace"], 100 * options["density"], options["eta"]).run(
            pool(ENCODER, matrices)
        )
        return {name.removeprefix(ENCODER): tensor for name, tensor in found.state_dict().items()}

    ways: dict[str, Callable[[], nn.Module | Tensors]] = {
        "weight_average": lambda: SimpleAverageAlgorithm().run(pool()),
        "task_arithmetic": lambda: TaskArithmeticAlgorithm(own["task_arithmetic"]["weight"]).run(pool()),
        "ties": lambda: TiesMergingAlgorithm(1.0, own["ties"]["density"], [], "mean").run(pool()),
        "slerp": lambda: SlerpMergeAlgorithm(own["slerp"]["t"]).run(pool(models=1)),
        "model_stock": lambda: ModelStock(ignore_keys=[]).run(pool()),
        "model_stock, two experts": lambda: ModelStock(ignore_keys=[]).run(pool(models=2)),
        "iso": lambda: IsotropicMergingInCommonSubspace(1.0, others).run(pool()),
        "svd": lambda: TaskSingularVectorMerging(1.0, others).run(pool()),
        "wudi": lambda: WUDIMerging(own["wudi"]["steps"], others).run(pool()),
        "doge": doge,
        "svc": lambda: SingularValueCalibrationArithmeticTask(
            own["svc"]["weight"], own["svc"]["alpha"]
        ).run(pool()),
        "fisher, no floor": lambda: fisher(0.0),
        "fisher": lambda: fisher(own["fisher"]["floor"]),
        "regmean": regmean,
        "regmean_plus_plus": regmean_plus_plus,
    }  # fmt: skip
    (folder / "theirs").mkdir(exist_ok=True)
    torch.set_num_threads(1)
    for name, way in ways.items():
        found = way()
        tensors = found if isinstance(found, dict) else found.state_dict()
        kept = {key: tensor.detach().contiguous().clone() for key, tensor in tensors.items() if key in base}
        save_file(kept, folder / "theirs" / f"{name}.safetensors")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
