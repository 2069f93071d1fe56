"""Configs as people write them for mergekit, merged by both: one of each feature, and all that were published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from parity.comparison import compare
from parity.merges import of_engine, of_mergekit
from parity.models import make
from parity.table import index, recorded
from parity.verdicts import verdicts
from thorough import thorough_but
from weight_space import BESIDE_MERGEKIT

pytest.importorskip("mergekit")
pytestmark = BESIDE_MERGEKIT

MODELS = "m/llama2-fp32"
BASE, ONE, TWO, CHAT = (f"{MODELS}/{name}" for name in ("base", "e1", "e2", "e3c"))
HALF = {"model": ONE, "parameters": {"weight": 0.5}}
OTHER = {"model": TWO, "parameters": {"weight": 0.3}}
# One config for each feature, or its documents.
CASES: dict[str, dict[str, Any] | list[dict[str, Any]]] = {
    "gradients and filters": {
        "merge_method": "linear",
        "models": [
            {"model": ONE, "parameters": {"weight": [{"filter": "mlp", "value": [0.2, 0.8]}, {"value": 0.4}]}},
            {"model": TWO, "parameters": {"weight": [1, 0.5]}},
        ],
    },
    "ignored keys, and the base among the models": {
        "name": "a-merge",
        "merge_method": "ties",
        "base_model": BASE,
        "lamda": 2,
        "models": [{"model": BASE}, HALF | {"density": 0.9}, OTHER],
        "parameters": {"density": 0.7, "normalize": True, "int8_mask": True, "select_topk": 0.1},
    },
    "one slice": {
        "merge_method": "slerp",
        "base_model": ONE,
        "slices": [{"sources": [{"model": model, "layer_range": [0, 2]} for model in (ONE, TWO)]}],
        "parameters": {"t": [{"filter": "self_attn", "value": [0, 1]}, {"value": 0.5}]},
    },
    "stacked layers": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": ONE, "layer_range": [0, 2]}]},
            {
                "sources": [
                    {
                        "model": TWO,
                        "layer_range": [1, 2],
                        "parameters": {"scale": [{"filter": "o_proj", "value": 0}, {"value": 1}]},
                    }
                ]
            },
        ],
    },
    "modules": {"merge_method": "linear", "modules": {"default": {"models": [HALF, OTHER]}}},
    "a method of the library": {"merge_method": "model_stock", "base_model": BASE, "models": [HALF, OTHER]},
    "a random method": {
        "merge_method": "dare_ties",
        "base_model": BASE,
        "models": [HALF, OTHER],
        "parameters": {"density": 0.5},
        "tokenizer_source": ONE,
    },
    "an adapter": {
        "merge_method": "task_arithmetic",
        "base_model": BASE,
        "models": [HALF, {"model": f"{BASE}+{MODELS}/lora1", "parameters": {"weight": 0.7}}],
    },
    "an adapter of the base, and the base alone": {
        "merge_method": "passthrough",
        "base_model": f"{BASE}+{MODELS}/lora1",
        "models": [{"model": f"{BASE}+{MODELS}/lora1"}],
    },
    "a union of vocabularies": {
        "merge_method": "linear",
        "parameters": {"weight": 0.2},
        "models": [HALF, {"model": CHAT, "parameters": {"weight": 0.5}}],
        "tokenizer_source": "union",
        "base_model": BASE,
    },
    "rules for tokens": {
        "merge_method": "linear",
        "base_model": BASE,
        "parameters": {"weight": 0.2},
        "models": [HALF, {"model": CHAT, "parameters": {"weight": 0.5}}],
        "tokenizer": {
            "source": "union",
            "tokens": {"<|im_start|>": {"source": CHAT, "force": True}, "<s>": {"source": {"kind": "zero"}}},
            "pad_to_multiple_of": 8,
        },
    },
    "a chat template": {
        "merge_method": "linear",
        "base_model": BASE,
        "parameters": {"weight": 0.2},
        "models": [HALF, OTHER],
        "chat_template": "chatml",
    },
    "several documents": [
        {"name": "one", "merge_method": "task_arithmetic", "base_model": BASE, "models": [HALF, OTHER]},
        {"merge_method": "nuslerp", "models": [{"model": "one", "parameters": {"weight": 0.6}}, OTHER]},
    ],
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    make(folder / MODELS, ["base", "e1", "e2", "e3c", "lora1"])
    return folder


@pytest.mark.parametrize("feature", CASES)
def test_a_feature_gives_the_merge_of_mergekit(work: Path, feature: str) -> None:
    given = CASES[feature]
    documents = [one | {"dtype": "float32"} for one in (given if isinstance(given, list) else [given])]
    config = work / f"{feature}.yaml"
    config.write_text("---\n".join(yaml.safe_dump(one, sort_keys=False) for one in documents), encoding="utf-8")
    theirs, ours = work / "mergekit" / feature, work / "engine" / feature
    assert of_mergekit(config, "multi" if isinstance(given, list) else "yaml", theirs).said == ""
    assert of_engine(config, ours).said == ""
    assert compare(config, ours, theirs).verdict == "equal"


# A fifth of them is slow, all of them are thorough, and what `make mergekit-parity` prints.
@pytest.mark.slow
@pytest.mark.parametrize("config", thorough_but(list(index())[::5], index()))
def test_a_published_config_has_its_verdict(work: Path, config: str) -> None:
    assert dict(verdicts(work, [config])) == {config: recorded()[config]}
