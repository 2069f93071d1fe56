"""Merges of models with different vocabularies, compared with mergekit's of the same YAML."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers
from conftest import cut_small, plan_of
from errors import refused
from safetensors.torch import load_file
from thorough import as_thorough
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from weight_space import Tensors, combine, difference, entries, mergekits, noise, ours, read, write_config

from engine.checkpoints.find import ROOT
from engine.config.mergekit_yaml import as_yaml
from engine.config.reader import parse_config
from engine.errors import CheckpointError, ConfigError
from engine.models import vocabularies
from engine.output.model_folder import output_files, write_companions
from engine.planning.layout import vocabulary
from engine.planning.layout.vocabulary import new_tokenizer
from engine.planning.open_models import base_folder
from engine.planning.planner import make_plan
from engine.run.inputs import identity
from engine.run.state import PLAN, encode_plan, load_plan, plan_digest
from engine.shards import gathered_rows
from engine.storage.local_folder import LocalFolder
from engine.storage.sealed import write_sealed

pytest.importorskip("mergekit")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning"),
    # Of peft and transformers about each other.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(61))]
# Tokens of each model in the order of their ids. The base has 64; expert0 has them in another order, one less and two
# more; expert1 has one of these, and one of its own; expert2 has the base's, and rows of no token.
TOKENS = {
    "base": WORDS,
    "expert0": [*WORDS[:3], "<a>", *WORDS[40:64], *WORDS[3:39], "<b>"],
    "expert1": [*WORDS, "<b>", "<c>"],
    "expert2": WORDS,
}
ROWS = {"expert2": 72}


def save_tokens(folder: Path, tokens: Sequence[str]) -> None:
    inner = Tokenizer(WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def make_models(folder: Path, tied: bool) -> Path:
    """Write a base and three experts, whose rows of embedding and head all differ, and an adapter of the base."""
    base = tiny.make_model(tied=tied)
    for seed, (name, tokens) in enumerate(TOKENS.items()):
        model = base if name == "base" else tiny.make_expert(base, seed)
        model.resize_token_embeddings(ROWS.get(name, len(tokens)), mean_resizing=False)
        with torch.no_grad():
            for part in (model.get_input_embeddings(), model.get_output_embeddings())[: 1 if tied else 2]:
                part.weight.add_(noise(part.weight.shape, seed, 0.2))
        tiny.save(model, folder / name)
        save_tokens(folder / name, tokens)
    lora = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(folder / "lora")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"), tied=False)


@pytest.fixture(scope="module", params=[False, as_thorough(True)], ids=["untied", "tied"])
def either(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The same models, or with heads that are tied to the embedding."""
    if not request.param:
        return Path(request.getfixturevalue("models"))
    return make_models(tmp_path_factory.mktemp("tied"), tied=True)


def config_of(folder: Path, method: str, names: Sequence[str], tokenizer: Any, **keys: Any) -> Path:
    """Write a YAML; a text in `tokenizer` that begins with @ is a model."""

    def located(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: located(inner) for key, inner in value.items()}
        return str(folder / value[1:]) if isinstance(value, str) and value.startswith("@") else value

    listed = [{"model": name, "parameters": {"weight": 0.2 + 0.3 * k}} for k, name in enumerate(names)]
    tokenizer = {"tokenizer_source": tokenizer} if isinstance(tokenizer, str) else {"tokenizer": tokenizer}
    return write_config(folder, merge_method=method, models=listed, dtype="float32", **located(tokenizer), **keys)


def by_token(tensors: Tensors, folder: Path) -> Tensors:
    """Return the tensors with the rows of tokens by their text: mergekit's order of new tokens changes."""
    found = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    order = [found[token] for token in sorted(found)]
    assert sorted(order) == list(range(len(order)))
    rows = {name: tensors[name] for name in (EMBEDDING, HEAD) if name in tensors}
    return tensors | {name: torch.cat([one[order], one[len(order) :]]) for name, one in rows.items()}


RULES: dict[str, Any] = {
    "source": "union",
    "tokens": {
        "<a>": {"source": {"kind": "zero"}},
        "<b>": {"source": "@expert1", "force": True},
        "<c>": {"source": {"kind": "model_token", "model": "@base", "token": "w7"}},
        "<new>": {"source": {"kind": "model_token", "model": "@expert0", "token_id": 5}},
        "w1": {"source": "@expert0", "force": True},
        "w2": {"source": {"kind": "zero"}, "force": True},
        "w3": {},
    },
    "pad_to_multiple_of": 16,
}
ALL, BASE = ("expert0", "expert1", "expert2"), {"base_model": "base"}


@pytest.mark.parametrize(
    ("method", "names", "tokenizer", "keys"),
    [
        ("task_arithmetic", ALL, RULES, BASE),
        as_thorough(("linear", ALL, "union", {})),
        as_thorough(("linear", ("base", *ALL), "union", BASE)),
        as_thorough(("slerp", ("base", "expert0"), "union", BASE | {"parameters": {"t": 0.3}})),
        as_thorough(("linear", ("base", *ALL), "base", BASE)),
        as_thorough(("ties", ALL, "@expert1", BASE)),
        as_thorough(("task_arithmetic", ALL, {"source": "base", "pad_to_multiple_of": 48}, BASE)),
        as_thorough(("linear", ("base", "expert0", "base+lora", "expert1"), "union", BASE)),
    ],
)
def test_a_merge_is_as_by_mergekit(
    either: Path, method: str, names: Sequence[str], tokenizer: Any, keys: dict[str, Any]
) -> None:
    check_as_by_mergekit(config_of(either, method, names, tokenizer, **keys), either)


def check_as_by_mergekit(config: Path, models: Path) -> None:
    """Merge a config by both, and compare tensors, number of tokens and tokenizer."""
    plan, folder = plan_of(config), config.with_suffix(".ours")
    combine(plan, folder, shards=2)
    write_companions(folder, plan, base_folder(plan), output_files(plan), plan.tokenizer and Path(plan.tokenizer))
    reference = config.with_suffix(".mergekit")
    wanted, theirs = (
        by_token(mergekits(config, lora_merge_cache=str(models / "loras")), reference),
        by_token(read(folder), folder),
    )
    assert theirs.keys() == wanted.keys()
    assert max(difference(theirs[name], tensor) for name, tensor in wanted.items()) < 1e-6
    sizes = [json.loads((one / "config.json").read_text())["vocab_size"] for one in (folder, reference)]
    assert sizes[0] == sizes[1] == len(wanted[EMBEDDING])
    mine, other = (transformers.AutoTokenizer.from_pretrained(one) for one in (folder, reference))
    assert mine.get_vocab().keys() == other.get_vocab().keys() and mine.special_tokens_map == other.special_tokens_map
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model(torch.tensor([[len(wanted[EMBEDDING]) - 1]])).logits.isfinite().all()


def layers(first: int, last: int, *models: str) -> dict[str, Any]:
    """Return a slice of a YAML."""
    listed = [{"model": name, "parameters": {"weight": 0.5 + 0.1 * k}} for k, name in enumerate(models)]
    return {"sources": [entry | {"layer_range": [first, last]} for entry in listed]}


@pytest.mark.parametrize(
    ("method", "slices", "keys"),
    [
        ("passthrough", [layers(0, 2, "expert0"), layers(1, 3, "base")], BASE | {"tokenizer_source": "base"}),
        as_thorough(("passthrough", [layers(0, 2, "expert0"), layers(1, 3, "expert1")], BASE)),
        as_thorough(("linear", [layers(0, 2, "base", "expert1"), layers(1, 3, "expert0", "expert1")], BASE)),
        as_thorough(("linear", [layers(0, 3, *ALL)], BASE)),
        as_thorough(
            ("slerp", [layers(0, 2, "expert0", "base")] * 2, {"base_model": "expert0", "parameters": {"t": 0.3}})
        ),
    ],
)
def test_a_stack_is_as_by_mergekit(
    models: Path, method: str, slices: list[dict[str, Any]], keys: dict[str, Any]
) -> None:
    keys = {"tokenizer_source": "union", "dtype": "float32", "merge_method": method} | keys
    check_as_by_mergekit(write_config(models, slices=slices, **keys), models)


def test_an_excluded_embedding_is_the_base_s_with_the_rows_of_the_output(models: Path) -> None:
    keys = BASE | {"tokenizer_source": str(models / "expert0"), "dtype": "bfloat16", "exclude": [".*(embed|head)"]}
    merged = ours(write_config(models, merge_method="linear", models=entries({"weight": 1}, {"weight": 1}), **keys))
    base = load_file(models / "base" / "model.safetensors")
    for row, token in enumerate(TOKENS["expert0"]):
        for name in (EMBEDDING, HEAD) if token in WORDS else ():
            assert torch.equal(merged[name][row], base[name][WORDS.index(token)].bfloat16())


def test_the_bits_depend_neither_on_shards_nor_on_blocks(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(models, "ties", ALL, RULES, **BASE, parameters={"density": 0.6})
    whole = ours(config)
    cut_small(monkeypatch, 64, 256)
    monkeypatch.setattr(gathered_rows, "BLOCK", 64)
    in_pieces = read(combine(plan_of(config), config.with_suffix(".pieces"), shards=3))
    assert all(torch.equal(in_pieces[name], tensor) for name, tensor in whole.items())


def test_an_adapter_of_the_embedding_has_the_base_s_rows(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models, tmp_path / "m")
    folder = tmp_path / "m"
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    options = {"r": 2, "target_modules": ["embed_tokens", "lm_head"], "init_lora_weights": False}
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, peft.LoraConfig(**options))
    adapted.save_pretrained(folder / "lora", save_embedding_layers=False)
    tiny.save(adapted.merge_and_unload(), folder / "merged")
    save_tokens(folder / "merged", WORDS)
    rules: dict[str, Any] = {"source": "union", "tokens": {"<new>": {"source": {"kind": "model_token", "token": "w9"}}}}
    merged = []
    for name in ("lora", "merged"):
        rules["tokens"]["<new>"]["source"]["model"] = f"@{name}"
        merged.append(ours(config_of(folder, "linear", ("expert0", name), rules, **BASE)))
    for tensor in (EMBEDDING, HEAD):
        torch.testing.assert_close(merged[0][tensor], merged[1][tensor], rtol=1e-6, atol=1e-6)


def test_plan_and_record_of_a_merge_repeat_it(models: Path, tmp_path: Path) -> None:
    plan = plan_of(config_of(models, "task_arithmetic", ALL, RULES, **BASE))
    assert plan.vocabulary is not None
    write_sealed(LocalFolder(tmp_path), PLAN, encode_plan(plan))
    assert load_plan(LocalFolder(tmp_path), plan_digest(plan)) == plan
    again = make_plan(parse_config(as_yaml(plan.resolved), models / "again.yaml"), ROOT)
    assert again.vocabulary == plan.vocabulary and identity(again).options == identity(plan).options
    assert again.base_header.vocab_size == plan.vocabulary.rows == 80
    rules = RULES | {"tokens": RULES["tokens"] | {"w2": {}}}
    other = plan_of(config_of(models, "task_arithmetic", ALL, rules, **BASE))
    assert identity(other).options["vocabulary.sha256"] != identity(plan).options["vocabulary.sha256"]


def test_new_tokens_have_ids_in_the_order_of_their_model(folder: Path) -> None:
    new = [f"x{i}" for i in range(8)]
    save_tokens(folder / "expert1", [*WORDS[:56], *new])
    plan = plan_of(config_of(folder, "linear", ("expert1", "expert2"), "union", **BASE))
    output = Tokenizer.from_str(new_tokenizer(plan)["tokenizer.json"].decode()).get_vocab()
    assert [output[token] for token in new] == [*range(64, 72)]


def test_models_that_have_the_same_tokens_are_merged_as_they_are(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "has_mergekit", lambda: False)
    for tokenizer in ("base", "union"):
        plan = plan_of(config_of(models, "linear", ("base", "base+lora"), tokenizer, **BASE))
        assert plan.vocabulary is None


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """A copy of the models, to be changed."""
    return shutil.copytree(models, tmp_path / "m")


def test_without_mergekit_only_a_tokenizer_that_is_there_can_be_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "has_mergekit", lambda: False)
    for name, size in ("base", 64), ("@expert0", 65):
        plan = plan_of(config_of(folder, "linear", ALL, name, **BASE))
        assert plan.vocabulary is not None and plan.vocabulary.rows == size and not plan.vocabulary.tokenizer
    for tokenizer in ("union", {"source": "base", "tokens": {"<new>": {"source": {"kind": "zero"}}}}):
        with refused(ConfigError, where="tokenizer_source", do="pip install"):
            plan_of(config_of(folder, "linear", ALL, tokenizer, **BASE))


def test_tokens_without_a_row_are_removed_from_the_base_s_tokenizer_or_zero(folder: Path) -> None:
    tokens = [f"t{i}" for i in range(70)]
    inner = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, []))
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder / "base")
    plan = plan_of(config_of(folder, "linear", ("base", "expert2"), "base", **BASE))
    assert plan.vocabulary is not None and plan.vocabulary.rows == 64
    kept = Tokenizer.from_str(new_tokenizer(plan)["tokenizer.json"].decode()).get_vocab()
    assert kept == {token: number for number, token in enumerate(tokens[:64])}
    shutil.copy(folder / "base" / "tokenizer.json", folder / "expert2")
    config = config_of(folder, "linear", ("base", "expert1"), {"source": "@expert1"}, **BASE)
    save_tokens(folder / "expert1", [*WORDS, *(f"x{i}" for i in range(9))])
    plan, merged = plan_of(config), ours(config)
    assert merged[EMBEDDING].shape[0] == 73 and not merged[EMBEDDING][66:].any()
    assert any("'x2', 'x3', 'x4' and 4 more" in note for _, note in plan.notes)


def test_a_model_without_a_tokenizer_has_the_base_s_tokens(folder: Path) -> None:
    for file in (folder / "expert2").glob("tokenizer*"):
        file.unlink()
    plan = plan_of(config_of(folder, "linear", ALL, "union", **BASE))
    assert plan.vocabulary is not None and plan.vocabulary.own[3] == plan.vocabulary.own[0]
    assert any("expert2" in note for _, note in plan.notes)
    for file in (folder / "base").glob("tokenizer*"):
        file.unlink()
    with refused(CheckpointError, where=str(folder / "base"), facts=["tokenizer"]):
        plan_of(config_of(folder, "linear", ALL, "union", **BASE))
    with refused(ConfigError, where="tokenizer_source", facts=["union"]):
        plan_of(tiny.make_merge(folder / "learned", tokenizer_source="union"))


@pytest.mark.parametrize(
    ("rule", "facts"),
    [
        ({"<a>": {}}, ["'<a>'", "`source`"]),
        ({"<a>": {"source": "@base"}}, ["'<a>'", "the base"]),
        (
            {"<a>": {"source": {"kind": "model_token", "model": "@expert1", "token": "w99"}}},
            ["'<a>'", "'w99'", "expert1"],
        ),
        ({"w1": {"source": {"kind": "model_token", "model": "@base", "token_id": 64}, "force": True}}, ["'w1'", "64"]),
    ],
)
def test_a_rule_that_has_no_row_is_refused(models: Path, rule: dict[str, Any], facts: list[str]) -> None:
    with refused(ConfigError, where="tokenizer.tokens", facts=facts):
        plan_of(config_of(models, "linear", ALL, {"source": "union", "tokens": rule}, **BASE))


def test_a_tokenizer_beyond_the_limits_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(folder, "linear", ALL, "base", **BASE)
    save_tokens(folder / "base", [*WORDS[:-1], "far"])
    file = folder / "base" / "tokenizer.json"
    file.write_text(file.read_text().replace('"far":63', '"far":4000000000').replace('"far": 63', '"far": 4000000000'))
    with refused(CheckpointError, where=str(folder / "base"), facts=["4,000,000,000", "64 tokens"]):
        plan_of(config)
    save_tokens(folder / "base", WORDS)
    (folder / "expert0" / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": -1}}}')
    with refused(CheckpointError, where="expert0"):
        plan_of(config)
    monkeypatch.setattr(vocabularies, "SECONDS", 1e-4)
    with refused(CheckpointError, where=str(folder / "base"), do="tokenizer_source: base", facts=["CPU seconds"]):
        plan_of(config_of(folder, "linear", ("expert1",), "union", **BASE))
    assert plan_of(config_of(folder, "linear", ("expert1",), "base", **BASE)).vocabulary is not None


def test_a_tokenizer_that_changes_during_a_merge_is_found(folder: Path, tmp_path: Path) -> None:
    plan = plan_of(config_of(folder, "linear", ALL, "union", **BASE))
    save_tokens(folder / "expert1", [*WORDS, "<d>", "<e>"])
    with refused(CheckpointError, where=str(folder / "base"), facts=["changed"]):
        write_companions(tmp_path, plan, base_folder(plan), output_files(plan))
