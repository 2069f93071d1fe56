"""Make a small mixture of experts smaller by each method of `compress`: the loss before and after.

A Qwen3-MoE of two blocks learns random facts of several domains (three tokens of a question, one of the answer). Each
method gets a quarter of the facts as unlabelled samples; loss and accuracy are of the answers of all other facts, which
the model knows, too. `prune` is the control: the dominant experts of `ream` as they are, and no merging.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
import transformers
import yaml
from report import Report, json_option, print_table
from torch import Tensor

from engine.checkpoints.writer import write_file
from engine.compression.compressor import Compressor
from engine.compression.config import read_compression
from engine.compression.model import CompressedModel
from engine.output.model_folder import output_files, write_companions
from engine.planning.planner import make_plan
from engine.storage.local_folder import LocalFolder

DOMAINS, KEYS, ANSWERS = 8, 128, 64
VOCABULARY = DOMAINS + KEYS + ANSWERS + 1
EXPERTS, TOP = 16, 2
BATCH, RATE = 512, 3e-3
# By name: the section `compress` without the number of experts.
WAYS: dict[str, dict[str, Any]] = {
    "ream": {"method": "ream"},
    "ream, groups of 2": {"method": "ream", "group_size": 2},
    "ream, not aligned": {"method": "ream", "align": "none"},
    "m_smoe": {"method": "m_smoe"},
    "m_smoe, not aligned": {"method": "m_smoe", "align": "none"},
    "sub_moe": {"method": "sub_moe"},
    "sub_moe, half of the directions": {"method": "sub_moe", "rank": 0.5},
}
CONTROL = "prune"


def facts(seed: int) -> Tensor:
    """Return all facts: a start token, domain, key and answer, [N, 4]."""
    generator = torch.Generator().manual_seed(seed)
    domains, keys = torch.meshgrid(torch.arange(DOMAINS), torch.arange(KEYS), indexing="ij")
    answers = torch.randint(ANSWERS, domains.shape, generator=generator)
    start = torch.full_like(domains, VOCABULARY - 1)
    columns = start, domains, DOMAINS + keys, DOMAINS + KEYS + answers
    rows = torch.stack([column.reshape(-1) for column in columns], 1)
    return rows[torch.randperm(len(rows), generator=generator)]


def loss_of(model: Any, rows: Tensor) -> tuple[Tensor, float]:
    """Return the mean loss of the answers, and the share that is right."""
    logits = model(input_ids=rows[:, :-1]).logits[:, -1].float()
    right = float((logits.argmax(-1) == rows[:, -1]).float().mean())
    return torch.nn.functional.cross_entropy(logits, rows[:, -1]), right


def train(rows: Tensor, steps: int, seed: int) -> Any:
    """Return a model that knows the facts."""
    torch.manual_seed(seed)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=16,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (BATCH,))]
        output = model(input_ids=batch[:, :-1], output_router_logits=True)
        logits = output.logits[:, -1]
        loss = torch.nn.functional.cross_entropy(logits, batch[:, -1]) + 0.01 * output.aux_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def compress(
    folder: Path, name: str, samples: Sequence[Mapping[str, Tensor]], section: Mapping[str, Any]
) -> tuple[Path, Any]:
    """Compress the model in a folder; return the folder of the smaller one, and its view."""
    config = {"model": "model", "compress": dict(section), "calibration": "data.jsonl"}
    (folder / "compress.yaml").write_text(yaml.safe_dump(config))
    plan, state = make_plan(read_compression(folder / "compress.yaml"), folder), LocalFolder(folder / f"{name}.run")
    actor = Compressor(plan, samples, state, torch.device("cpu"))
    for part in range(actor.parts):
        actor.compress(part)
    view, out = CompressedModel(plan, state), folder / name
    out.mkdir()
    files = output_files(view.smaller)
    for file in files:
        write_file(LocalFolder(out), file, lambda entry: view.parts(entry.name))
    write_companions(out, view.smaller, folder / "model", files)
    return out, view


def prune(folder: Path, view: Any) -> Any:
    """Return the model with the dominant experts of a compression as they were."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    for layer in view.layout.layers:
        module, kept = model.get_submodule(layer), view.stored(layer)["dominant"]
        for owner, weight in ((module.experts, "gate_up_proj"), (module.experts, "down_proj"), (module.gate, "weight")):
            setattr(owner, weight, torch.nn.Parameter(getattr(owner, weight)[kept]))
        module.experts.num_experts = module.gate.num_experts = view.kept
    return model


def measure(folder: Path, rows: Tensor, model: Any, left: Sequence[int]) -> dict[tuple[str, int], tuple[float, float]]:
    """Return loss and accuracy by way and number of experts; of the whole model by the name `before`."""
    model.save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text('{"input_ids": [1, 2, 3]}\n')  # the samples are given as tokens
    quarter = len(rows) // 4
    one = [row[None, :-1] for row in rows[:quarter]]
    samples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in one]
    held = rows[quarter:]
    with torch.no_grad():
        loss, right = loss_of(model, held)
        found = {("before", EXPERTS): (float(loss), right)}
        for count in left:
            for way, section in WAYS.items():
                if count * section.get("group_size", EXPERTS) < EXPERTS:
                    continue  # the groups do not hold all experts
                out, view = compress(folder, f"{way}-{count}", samples, section | {"experts": count})
                smaller = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
                loss, right = loss_of(smaller, held)
                found[way, count] = float(loss), right
                if way == "ream":
                    loss, right = loss_of(prune(folder, view), held)
                    found[CONTROL, count] = float(loss), right
    return found


@click.command()
@click.option("--steps", default=600, show_default=True, help="Training steps of the model.")
@click.option("--seeds", default=3, show_default=True, help="Models, each of facts of its own.")
@click.option("--left", multiple=True, type=int, default=(12, 8, 4), show_default=True, help="Experts that are left.")
@json_option("compression.json")
def main(steps: int, seeds: int, left: tuple[int, ...], path: Path | None) -> None:
    """Measure and print."""
    transformers.utils.logging.disable_progress_bar()
    torch.use_deterministic_algorithms(True)
    report = Report({"steps": steps, "seeds": seeds, "experts": EXPERTS, "top": TOP, "facts": DOMAINS * KEYS})
    runs = []
    for seed in range(seeds):
        began, rows = time.perf_counter(), facts(seed)
        model = train(rows, steps, seed)
        trained = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            runs.append(measure(Path(folder), rows, model, left))
        print(f"seed {seed}: trained in {trained - began:.0f} s, measured in {time.perf_counter() - trained:.0f} s")
    rows_of_table = dict[str, list[str]]()
    for way in ("before", CONTROL, *WAYS):
        cells = []
        for count in (EXPERTS,) if way == "before" else left:
            if (way, count) not in runs[0]:
                cells.append("–")
                continue
            losses, rights = zip(*(run[way, count] for run in runs), strict=True)
            spread = statistics.stdev(losses) if seeds > 1 else 0.0
            cells.append(f"{statistics.mean(losses):.3f} ± {spread:.3f} ({statistics.mean(rights):.0%})")
            report.other |= {f"loss {way} {count}": statistics.mean(losses)}
            report.other |= {f"accuracy {way} {count}": statistics.mean(rights)}
        rows_of_table[way] = cells
    title = f"loss ± standard deviation (accuracy) of answers, {seeds} models of {EXPERTS} experts, {TOP} a token"
    print_table(title, [*(f"{count} left" for count in left)], rows_of_table)
    report.finish(path or Path("compression.json"))


if __name__ == "__main__":
    main()
