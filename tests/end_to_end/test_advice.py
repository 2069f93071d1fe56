"""Advice is right: each `do` of a message is followed on a case where it applies, and what it names is then accepted.

The rows hold against tests/golden/messages.txt: a new `do` of the packages below needs a row, or an entry that names
the test that follows it, or says why none does.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile_inputs as given
import peft
import pytest
import tiny
import torch
import transformers
import yaml
from advice import FOLLOWED, Advice, with_advice
from conftest import plan_of
from hostile_inputs import Q, edit, edit_json, expert, put, weight_space
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.calibration.encoder import encoder
from engine.calibration.samples import make_samples
from engine.errors import MergeError
from engine.planning.plan import Plan
from engine.run.preparation import check_heads, check_inputs, check_positions

# The packages whose advice is followed here, and the advice that is followed elsewhere.
ELSEWHERE = {
    "has both `statistics` and `optimizer_state`": "test_statistics_and_the_state_of_a_training_are_not_both_given",
    "set `tokenizer_source` to a model that has a chat template": "test_images_need_a_chat_template_which_tokenizer",
    "keep only the records that are needed": "test_hostile_records.py: files with more than a million lines",
    "save the image again": "the file is one that no image library writes",
    "reduce the images with `image_options`": "test_an_option_decides_how_many_tokens_an_image_has",
    "write a copy of the base with two tensors": "test_other_changes_need_a_base_that_is_not_tied",
    "give the base a head of its own": "test_a_head_that_is_not_the_embedding_needs_a_base_with_a_head",
    "save one with peft": "test_a_file_of_two_adapters_is_refused",
    "{OF_BASE}": "test_deltas.py: test_another_base_is_refused",
    "set `exclude: {json.dumps(others)}`": "test_a_tensor_that_exclude_keeps_is_refused_with_another_exclude",
    "{ | {merged}}": "test_what_is_refused_merges_with_the_command_of_the_message",
    "free disk space": "test_full_disk.py",
    "give each document a `name` of its own": "test_advice_on_documents.py",
    "let one of them use other models": "test_advice_on_documents.py",
    "run `mergekit-moe CONFIG FOLDER`": "the merge needs another program",
    "{INSTALL}": "the method needs another package",
    "{advice}": "tests of original InternVL checkpoints set `trust_remote_code: true`",
    "shorten the record, or use another tokenizer": "test_hostile_tokenizers.py: tokenizers beyond the limits",
    "simplify the patterns": "test_hostile_configs.py: patterns of exponential time",
    "put the slices under `modules:": "test_stacking.py: test_slices_of_a_model_with_images_are_those_of_a_module",
    "merge layers of the same kind": "test_stacking.py: test_layers_of_another_kind_are_stacked_but_not_merged",
    "list the models one by one": "test_the_options_of_a_storage_are_no_pattern",
    "use another `algorithm`, such as tpe": "test_space.py: test_cmaes_takes_numbers_alone",
    "use tpe, or give more parts": "test_space.py: test_algorithms_of_several_objectives_need_several",
    "run the same command again": "test_a_model_that_changes_after_the_plan_was_made_is_named",
}

Change = Callable[[Path], Any]
MODELS = ("base", "expert0", "expert1")


@dataclass(frozen=True)
class Row:
    """A case: `spoil` breaks a merge; each of `follow` is a way to do what the message's `do` says.

    `follow` takes the folder and the matched text of the regular expression `named` in `do`, which is a template's
    text in the golden file, unless `template` is given.
    """

    named: str
    spoil: Change
    follow: tuple[Callable[[Path, re.Match[str]], Any], ...]
    template: str = ""


def check(folder: Path) -> Plan:
    """Check a merge up to the point where its actors would start."""
    plan = plan_of(folder / "merge.yaml")
    check_heads(plan)
    if plan.config.learned:
        plan, records = check_inputs(plan)
        check_positions(plan, make_samples(records, encoder(plan, records), plan))
    return plan


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore the warnings of peft and transformers about each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def python(found: re.Match[str]) -> None:
    """Run the Python that a message names, in this process."""
    with quiet():
        exec(found[1], {})


def texts(folder: Path, *records: dict[str, Any], template: str | None = None) -> None:
    """Write the second expert's records, and the chat template of the base."""
    given.calibration(folder, "".join(json.dumps(record) + "\n" for record in records))
    if template is not None:
        put(folder, "base/chat_template.jinja", template)


def another_template(folder: Path, found: re.Match[str], template: str | None = None) -> None:
    """Set `tokenizer_source` to a model with a chat template."""
    tiny.save_tokenizer(folder / "expert0")
    if template is not None:
        put(folder, "expert0/chat_template.jinja", template)
    edit(folder, tokenizer_source="expert0")


def change(folder: Path, edited: Callable[[dict[str, Tensor]], dict[str, Tensor]], model: str = "expert1") -> None:
    """Change the tensors of a model's file."""
    path = folder / model / "model.safetensors"
    save_file(edited(load_file(path)), path, metadata={"format": "pt"})


def trained(folder: Path, base: str = "base", **options: Any) -> None:
    """Replace the second expert by an adapter of a base."""
    shutil.rmtree(folder / "expert1")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / base)
    with quiet():
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        adapted.save_pretrained(folder / "expert1", **options)


def positions(folder: Path) -> None:
    """Replace the models by models with a table of 32 positions."""
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    base = transformers.GPT2LMHeadModel(config)
    for seed, name in enumerate(given.MODELS):
        (folder / name / "generation_config.json").unlink()
        tiny.save(tiny.make_expert(base, seed), folder / name)
    edit(folder, parameters={})


def resized(folder: Path, model: str) -> None:
    """Give a model eight more tokens at the end of its vocabulary."""
    weights = transformers.AutoModelForCausalLM.from_pretrained(folder / model)
    weights.resize_token_embeddings(72, mean_resizing=False)
    weights.save_pretrained(folder / model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.add_tokens([f"more{i}" for i in range(8)])
    tokenizer.save_pretrained(folder / model)


def more_tokens(folder: Path, learned: bool = False) -> None:
    if not learned:
        weight_space(folder)
    tiny.save_tokenizer(folder / "expert0")
    resized(folder, "expert1")


def resized_adapter(folder: Path) -> None:
    weight_space(folder)
    resized(folder, "expert1")
    (folder / "expert1").rename(folder / "resized")
    (folder / "expert1").mkdir()
    trained(folder, "resized", save_embedding_layers=True)
    for file in (folder / "resized").glob("tokenizer*"):
        shutil.copy(file, folder / "expert1")
    tiny.save_tokenizer(folder / "expert0")


def pickled(folder: Path, model: str) -> None:
    """Store a model's weights as a pickle."""
    torch.save(load_file(folder / model / "model.safetensors"), folder / model / "pytorch_model.bin")
    (folder / model / "model.safetensors").unlink()


def saved_again(folder: Path, found: re.Match[str]) -> None:
    transformers.AutoModelForCausalLM.from_pretrained(folder / "expert1").save_pretrained(folder / "expert1")


def adapter_saved_again(folder: Path, found: re.Match[str]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    with quiet():
        peft.PeftModel.from_pretrained(model, folder / "expert1").save_pretrained(folder / "expert1")


def pickled_adapter(folder: Path) -> None:
    trained(folder)
    torch.save(load_file(folder / "expert1/adapter_model.safetensors"), folder / "expert1/adapter_model.bin")
    (folder / "expert1/adapter_model.safetensors").unlink()


def of_another_base(folder: Path) -> None:
    """Train the second expert's adapter on a base with more layers, which its config names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.COMMON, "num_hidden_layers", 4)
        tiny.save(tiny.make_model(), folder / "deep")
    trained(folder, "deep")
    models = [{"model": "expert1"}]
    weight_space(folder, models=models)


def checkpoints_of_training(folder: Path) -> None:
    (folder / "expert1").rename(folder / "there")
    (folder / "expert1").mkdir()
    (folder / "there").rename(folder / "expert1" / "checkpoint-20")


def options(folder: Path, found: re.Match[str]) -> None:
    """Set the option `key: value` that a message names."""
    edit(folder, **yaml.safe_load(found[1]))


def spoilt_option(**keys: Any) -> Change:
    return lambda folder: edit(folder, **keys)


ONE, DIRECTIONS = {"model": "expert1"}, {"chunks": "spectral"}
CHAT = [{"role": "user", "content": "w1"}]
CALL = {"messages": [*CHAT, {"role": "assistant", "tool_calls": [{"function": {"name": "w7", "arguments": {}}}]}]}
SYSTEM = {"messages": [{"role": "system", "content": "w2"}, *CHAT]}
PLAIN = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
TOOLS = PLAIN + "{% for c in messages[-1]['tool_calls'] or [] %}{{ c['function']['name'] }}{% endfor %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}" + PLAIN
LONG = {"question": "w1 " * 20, "response": "w2"}
OWN = {"parameters": {"loss_tokens": "response"}, "calibration": {"generate_responses": 0}}

# Slices of the tiny models, which have three layers.
BASE, FIRST = ({"model": model, "layer_range": [0, 2]} for model in ("base", "expert0"))
LAST = {"model": "expert0", "layer_range": [1, 3]}
SLICES = [{"sources": [BASE, LAST]}]

ROWS = (
    # Slices
    Row("remove the others", lambda f: weight_space(f, slices=SLICES), (lambda f, _: weight_space(f),)),
    Row(
        "remove the other$",
        lambda f: stacked(f, modules={"default": {"slices": SLICES, "models": [ONE]}}),
        (lambda f, _: stacked(f, modules={"default": {"slices": SLICES}}),),
        template="the module has both",
    ),
    Row(
        "list the models under `models`, or use a weight-space method",
        lambda f: edit(f, slices=SLICES),
        (lambda f, _: without(f, "slices"), lambda f, _: stacked(f, SLICES)),
    ),
    Row(
        r"give it a `layer_range` of 2 layers, or give it a slice of its own",
        lambda f: stacked(f, [{"sources": [BASE, LAST | {"layer_range": [0, 3]}]}]),
        (
            lambda f, _: stacked(f, SLICES),
            lambda f, _: stacked(f, [{"sources": [BASE]}, {"sources": [LAST | {"layer_range": [0, 3]}]}]),
        ),
        template="give it a `layer_range` of {lengths[0]} layers, or give it a slice of its own",
    ),
    Row(
        "give the numbers of the layers, or list the models under `models` to merge all layers",
        lambda f: stacked(f, [{"sources": [BASE, ONE]}]),
        (lambda f, _: stacked(f, SLICES), lambda f, _: weight_space(f)),
    ),
    Row(
        "use fewer slices",
        lambda f: stacked(f, [{"sources": [BASE | {"layer_range": [0, 20_000]}]}]),
        (lambda f, _: stacked(f, SLICES),),
    ),
    Row(
        "list it there with its `layer_range`",
        lambda f: stacked(f, [{"sources": [FIRST], "base_model": "expert1"}]),
        (lambda f, _: stacked(f, [{"sources": [FIRST, LAST | {"model": "expert1"}], "base_model": "expert1"}]),),
    ),
    Row(
        "list the base there with its `layer_range`",
        lambda f: (stacked(f, [{"sources": [FIRST, LAST | {"model": "expert1"}]}]), edit(f, merge_method="ties")),
        (lambda f, _: edit(f, slices=[{"sources": [FIRST, BASE, LAST | {"model": "expert1"}]}]),),
    ),
    Row(
        "correct the numbers",
        lambda f: stacked(f, [{"sources": [FIRST | {"layer_range": [2, 4]}]}]),
        (lambda f, _: stacked(f, SLICES),),
    ),
    Row(
        "use these names, or `default` for all tensors that no other module has",
        lambda f: stacked(f, modules={"vision_tower": {"models": [ONE]}}),
        (lambda f, _: stacked(f, modules={"default": {"models": [ONE]}}),),
    ),
    Row(
        "list the models under `models`, or use another method",
        lambda f: (stacked(f, SLICES), edit(f, merge_method="svd_intermediate")),
        (
            lambda f, _: weight_space(f, merge_method="svd_intermediate"),
            lambda f, _: edit(f, merge_method="task_arithmetic"),
        ),
    ),
    # Records
    Row(
        "save it as UTF-8",
        lambda f: given.calibration(f, b'{"text": "\xfc"}\n'),
        (lambda f, _: texts(f, {"text": "ü"}),),
    ),
    Row(
        "if each line is a record, name the file .jsonl",
        lambda f: given.calibration(f, '{"text": "w1"}\n{"text": "w2"}\n', "x.json"),
        (lambda f, _: texts(f, {"text": "w1"}, {"text": "w2"}),),
    ),
    Row(
        "if the whole file is a list of records, name it .json",
        lambda f: given.calibration(f, '[\n{"text": "w1"}\n]\n'),
        (lambda f, _: given.calibration(f, '[\n{"text": "w1"}\n]\n', "x.json"),),
    ),
    Row(
        "add a response, or set `calibration.generate_responses`",
        lambda f: (texts(f, {"question": "w1"}), edit(f, preset=None, **OWN), expert0_answers(f)),
        (
            lambda f, _: texts(f, {"question": "w1", "response": "w2"}),
            lambda f, _: edit(f, calibration={"generate_responses": 4}),
        ),
    ),
    Row(
        "raise `calibration.max_length`",
        lambda f: (
            texts(f, LONG),
            edit(
                f,
                preset=None,
                parameters={"loss_tokens": "response"},
                calibration={"max_length": 9, "generate_responses": 4},
            ),
            expert0_answers(f),
        ),
        (lambda f, _: edit(f, calibration={"max_length": 60, "generate_responses": 4}),),
    ),
    Row(
        r"set `calibration\.max_length: (\d+)`",
        lambda f: (positions(f), texts(f, {"text": "w1 " * 40})),
        (lambda f, m: edit(f, calibration={"max_length": int(m[1])}),),
        template="set `calibration.max_length: {most}`",
    ),
    Row(
        r"set `calibration\.max_length: (\d+)`",
        lambda f: (positions(f), texts(f, {"question": "w1 " * 20}), edit(f, calibration={"generate_responses": 30})),
        (lambda f, m: edit(f, calibration={"generate_responses": 30, "max_length": int(m[1])}),),
        template="set `calibration.max_length: {most}`",
    ),
    Row(
        "set `tokenizer_source` to a model that has a chat template, or give the chat as `text`",
        lambda f: (texts(f, {"messages": CHAT}), (f / "base/chat_template.jinja").unlink()),
        (another_template, lambda f, _: texts(f, {"text": "user: w1"})),
    ),
    Row(
        "put the text of the system message at the start of the first user message",
        lambda f: texts(f, SYSTEM, template=NO_SYSTEM),
        (lambda f, _: texts(f, {"messages": [{"role": "user", "content": "w2 w1"}]}),),
    ),
    Row(
        "set `tokenizer_source` to a model that has such a template, or leave out records with tools",
        lambda f: texts(f, CALL, {"text": "w1"}),
        (lambda f, m: another_template(f, m, TOOLS), lambda f, _: texts(f, {"text": "w1"})),
    ),
    Row(
        "add the tokenizer's files to the base's folder, or give the calibration records as `input_ids`",
        lambda f: (texts(f, {"text": "w1"}), [file.unlink() for file in (f / "base").glob("tokenizer*")]),
        (lambda f, _: tiny.save_tokenizer(f / "base"), lambda f, _: texts(f, {"input_ids": [7]})),
        template="{do}",
    ),
    # Adapters
    Row(
        r'set `tokenizer_source`: python -c "(.+?)"$',
        resized_adapter,
        (lambda f, m: (python(m), use(f, "expert1-merged"), edit(f, tokenizer_source="base")),),
        template="{{do}: {merge_with_peft(file, tensor.shape[0])} | }",
    ),
    Row("load it with peft and save it", pickled_adapter, (adapter_saved_again,), template="'transformers', 'peft'"),
    Row(
        "use the base that the adapter was trained on: (.+)",
        of_another_base,
        (lambda f, m: edit(f, base_model=m[1]),),
        template="use the base that the adapter was trained on",
    ),
    Row(
        "save the adapter again with peft, or remove the module from adapter_config.json",
        lambda f: given.adapter(f, modules_to_save=["lm_head"]),
        (lambda f, _: edit_json(f, "expert1/adapter_config.json", modules_to_save=None),),
        template="save the adapter again with peft",
    ),
    # Checkpoints
    Row(
        "check the path .* or the hub id",
        lambda f: expert(f, model="expert2/x"),
        (lambda f, _: expert(f, model="expert1"),),
        template="check the path",
    ),
    Row(
        "replace the link by the file",
        lambda f: given.move_out(f, "expert1/config.json"),
        (lambda f, _: shutil.copy((f / "expert1/config.json").resolve(), replaced(f / "expert1/config.json")),),
    ),
    Row(
        "use the model in float32, bfloat16 or float16",
        lambda f: (
            change(f, lambda t: t | {Q: t[Q].to(torch.uint8)}),
            edit_json(f, "expert1/config.json", quantization_config={"quant_method": "bitsandbytes"}),
        ),
        (lambda f, _: (change(f, lambda t: t | {Q: t[Q].float()}),),),
    ),
    Row(
        "name one of them: (.+)",
        checkpoints_of_training,
        (lambda f, m: expert(f, model=m[1]),),
        template="name one of them",
    ),
    Row(
        "load it with transformers and save it",
        lambda f: pickled(f, "expert1"),
        (saved_again,),
        template="{{CONVERT} | }",
    ),
    Row(
        "download or save it again",
        lambda f: (tiny.save(tiny.make_model(), f / "copy"), put(f, "expert1/model.safetensors", b"cut")),
        (lambda f, _: shutil.copy(f / "copy/model.safetensors", f / "expert1"),),
    ),
    Row(
        "use models whose vocabularies differ only by tokens at their ends",
        lambda f: (
            more_tokens(f, learned=True),
            edit(f, tokenizer_source="base"),
            put(f, "expert1/tokenizer.json", swapped((f / "expert1/tokenizer.json").read_text())),
        ),
        (lambda f, _: put(f, "expert1/tokenizer.json", swapped((f / "expert1/tokenizer.json").read_text())),),
    ),
    Row(
        "set `tokenizer_source` to `base` or to a model; tokens that it lacks are dropped",
        more_tokens,
        (lambda f, _: edit(f, tokenizer_source="base"), lambda f, _: edit(f, tokenizer_source="expert1")),
        template="set `tokenizer_source` to `base` or to a model",
    ),
    Row(
        "set `(tokenizer_source: base)`; tokens that the base lacks are dropped",
        lambda f: more_tokens(f, learned=True),
        (options,),
        template="set `tokenizer_source: base`; tokens that the base lacks are dropped",
    ),
    Row(
        "set `(on_missing: base)`",
        lambda f: (weight_space(f), change(f, lambda t: {n: x for n, x in t.items() if n != Q})),
        (options,),
        template="{do}",
    ),
    Row(
        "save the expert with the base's names",
        lambda f: (weight_space(f), change(f, lambda t: {f"x.{n}": x for n, x in t.items()})),
        (lambda f, _: change(f, lambda t: {n.removeprefix("x."): x for n, x in t.items()}),),
        template="{do}",
    ),
    Row(
        "remove the expert from `models`, or save it with the base's names",
        lambda f: (weight_space(f, on_missing="base"), change(f, lambda t: {f"x.{n}": x for n, x in t.items()})),
        (
            lambda f, _: edit(f, models=[{"model": "expert0"}]),
            lambda f, _: change(f, lambda t: {n.removeprefix("x."): x for n, x in t.items()}),
        ),
    ),
    Row(
        "save the model that the wrapper holds with `save_pretrained`",
        lambda f: change(f, lambda t: {f"_orig_mod.{n}": x for n, x in t.items()}, "base"),
        (lambda f, _: change(f, lambda t: {n.removeprefix("_orig_mod."): x for n, x in t.items()}, "base"),),
    ),
    # Options
    Row(
        "remove some of the patterns: (.+)",
        spoilt_option(exclude=[".*layers.*", ".*embed.*", ".*norm.*", ".*head.*"]),
        (lambda f, m: edit(f, exclude=m[1].split(", ")[1:]),),
        template="remove some of the patterns",
    ),
    Row(
        "raise `budget`, or use `(merge_method: expert_merging)`",
        spoilt_option(parameters={"budget": 0.01}),
        (lambda f, _: edit(f, parameters={"budget": 1.0}), options),
        template="raise `budget`, or use `merge_method: expert_merging`",
    ),
    Row(
        "load the model with transformers and save it",
        lambda f: [change(f, lambda t: t | {"model.more.weight": torch.ones(2)}, model) for model in MODELS],
        (lambda f, _: [transformed(f / model) for model in MODELS],),
    ),
    Row(
        "lower `budget`", spoilt_option(parameters={"budget": 1e5}), (lambda f, _: edit(f, parameters={"budget": 2.0}),)
    ),
    Row(
        "set `base_model`",
        lambda f: (given.adapter(f), weight_space(f, base_model=None)),
        (lambda f, _: edit(f, base_model="base"),),
    ),
    Row(
        "merge model and adapter into one checkpoint first",
        lambda f: (trained(f), expert(f, model="expert0+expert1")),
        (lambda f, _: (one_checkpoint(f), expert(f, model="one")),),
    ),
    Row(
        "give the expert another `name`",
        lambda f: weight_space(f, merge_method="svd_intermediate", models=[{"model": "expert0", "name": "a b"}, ONE]),
        (lambda f, _: edit(f, models=[{"model": "expert0", "name": "ab"}, ONE]),),
    ),
    Row(
        "give one of them another `name`",
        lambda f: expert(f, name="expert0"),
        (lambda f, _: expert(f, name="another"),),
    ),
    Row(
        "did you mean '(.+)'",
        lambda f: weight_space(f, merge_method="lineal"),
        (lambda f, m: edit(f, merge_method=m[1]),),
        template="run `python cli.py methods`",
    ),
    Row(
        "did you mean '(.+)'",
        lambda f: weight_space(f, merge_method="wudi", parameters={"step": 5}),
        (lambda f, m: edit(f, parameters={m[1]: 5}),),
        template="use the options of the method",
    ),
    Row(
        "did you mean '(.+)'",
        spoilt_option(calibraton={"max_length": 9}),
        (lambda f, m: renamed_key(f, "calibraton", m[1]),),
        template="{do}",
    ),
    # Chunks of singular directions
    Row(
        "leave out `cluster.factors`, or set `chunks: contiguous`",
        lambda f: edit(f, parameters=DIRECTIONS | {"task_vectors": "orthogonal"}, cluster={"factors": "never"}),
        (lambda f, _: edit(f, cluster={}), lambda f, _: edit(f, parameters={})),
    ),
    Row(
        "set `task_vectors: orthogonal` or `chunks: contiguous`",
        lambda f: edit(f, parameters=DIRECTIONS),
        (
            lambda f, _: edit(f, parameters=DIRECTIONS | {"task_vectors": "orthogonal"}),
            lambda f, _: edit(f, parameters={"chunks": "contiguous"}),
        ),
    ),
    Row(
        "set `chunks: contiguous`$",
        lambda f: edit(
            f, parameters=DIRECTIONS | {"task_vectors": "orthogonal"}, exclude=[".*proj.*", ".*(embed|head).*"]
        ),
        (lambda f, _: edit(f, parameters={"chunks": "contiguous"}),),
        template="{set `chunks: contiguous` |",
    ),
    # Trainers
    Row(
        "set `gradients: stream`, or leave out `cluster.trainers`",
        lambda f: edit(f, gradients="accumulate", cluster={"trainers": 2}),
        (lambda f, _: edit(f, gradients="stream"), lambda f, _: edit(f, cluster={})),
    ),
)


def stacked(folder: Path, slices: Any = None, modules: Any = None) -> None:
    """Write a config of a weight-space method with slices or modules."""
    weight_space(folder, models=None, slices=slices, modules=modules)


def without(folder: Path, key: str) -> None:
    config = yaml.safe_load((folder / "merge.yaml").read_text())
    del config[key]
    put(folder, "merge.yaml", yaml.safe_dump(config))


def expert0_answers(folder: Path) -> None:
    """Give the first expert records with responses."""
    put(folder, "expert0.jsonl", json.dumps({"question": "w1", "response": "w2"}))


def use(folder: Path, model: str) -> None:
    """Use another model as the second expert."""
    models = yaml.safe_load((folder / "merge.yaml").read_text())["models"]
    edit(folder, models=[models[0], models[1] | {"model": model}])


def replaced(link: Path) -> Path:
    """Remove a link, and return its path."""
    link.unlink()
    return link


def swapped(text: str) -> str:
    """Return the text of a tokenizer.json with two of its words swapped."""
    return text.replace('"w1"', '"?"').replace('"w2"', '"w1"').replace('"?"', '"w2"')


def one_checkpoint(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "expert0")
    with quiet():
        peft.PeftModel.from_pretrained(model, folder / "expert1").merge_and_unload().save_pretrained(folder / "one")


def transformed(model: Path) -> None:
    transformers.AutoModelForCausalLM.from_pretrained(model).save_pretrained(model)


def renamed_key(folder: Path, key: str, other: str) -> None:
    config = yaml.safe_load((folder / "merge.yaml").read_text())
    config[other] = config.pop(key)
    put(folder, "merge.yaml", yaml.safe_dump(config))


def test_every_advice_has_a_row_or_a_test_elsewhere() -> None:
    advice = Advice(__name__, ELSEWHERE)
    advice.followed(*(row.template or row.named for row in ROWS))
    advice.check()


def test_the_advice_of_every_module_is_followed() -> None:
    followed = tuple(start for starts in FOLLOWED.values() for start in starts)
    assert {name for name in with_advice() if not name.startswith(followed)} == set()


@pytest.mark.parametrize(
    ("row", "way"),
    [(row, way) for row in ROWS for way in range(len(row.follow))],
    ids=lambda value: value.named if isinstance(value, Row) else str(value),
)
def test_the_advice_leads_to_a_merge_that_is_accepted(llama_merge: Path, tmp_path: Path, row: Row, way: int) -> None:
    folder = shutil.copytree(llama_merge.parent, tmp_path / "merge")
    row.spoil(folder)
    with pytest.raises(MergeError) as caught:
        check(folder)
    found = re.search(row.named, caught.value.do)
    assert found is not None, f"{row.named!r} is not in the advice of: {caught.value}"
    row.follow[way](folder, found)
    check(folder)
