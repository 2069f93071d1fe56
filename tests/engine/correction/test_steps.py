"""The steps on single tensors after a merge, by shards as plain classes, beside the papers' equations in numpy."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import tiny
import torch
from conftest import plan_of
from correction_helpers import store_mean
from errors import refused
from peft_adapters import build
from safetensors.torch import load_file
from weight_space import MATRICES, SHAPES, Tensors, combine, entries, noise, ours, read, write_arrays, write_config

from actors.shard import Shard
from engine.checkpoints.writer import OutputFile
from engine.correction.files import load_calibrated, load_merged, merged_file, save_tensors, solved_file
from engine.correction.steps import steps_around
from engine.errors import CheckpointError, RunError
from engine.learning.learner import first_stage
from engine.output.model_folder import output_files
from engine.planning.costs.flops import SVD_COPIES, step_bytes
from engine.planning.plan import Plan
from engine.run.inputs import identity
from engine.statistics.files import StatisticsWriter
from engine.statistics.moments import Moments
from engine.storage.local_folder import LocalFolder
from engine.task_vectors.coefficients import Coefficients

pytestmark = pytest.mark.usefixtures("one_thread")

EXPERTS, TOKENS, ALPHA, OMEGA = 3, 20, 0.2, 0.3
Array = npt.NDArray[np.float64]
# The base ran these layers; of the third matrix nothing is known.
SEEN = list(MATRICES)[:2]
SVC, AIM = {"method": "svc", "alpha": ALPHA}, {"method": "aim", "omega": OMEGA}


def inputs(name: str) -> torch.Tensor:
    return noise((TOKENS, SHAPES[name][1]), len(name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("steps")
    write_arrays(made, EXPERTS)
    (made / "statistics").mkdir()
    writer = StatisticsWriter(LocalFolder(made / "statistics"))
    for name in SEEN:
        x = inputs(name)
        writer.moments([((name,), Moments(TOKENS, x.square().sum(0), x.abs().sum(0)))])
    writer.finish(base={}, model={}, data="0" * 64, sequences=4, tokens=TOKENS, dtype="float32", kinds=("activations",))
    return made


def config(folder: Path, steps: Sequence[Any], method: str = "task_arithmetic", **more: Any) -> Path:
    options = {"merge_method": method, "base_model": "base", "models": entries(*[{"weight": 0.6}] * EXPERTS)}
    given = {"base_statistics": str(folder / "statistics")} if AIM in steps else {}
    # Several files, so that every shard has some.
    return write_config(folder, **options, **given, calibrate=list(steps), max_shard_size=1500, **more)


def svc(tau: Array, taus: Sequence[Array]) -> Array:
    u, sigma, vt = np.linalg.svd(tau, full_matrices=False)
    result = np.zeros_like(tau)
    for r in np.flatnonzero(sigma > 1e-9):
        merged = tau.T @ u[:, r]
        own = [of.T @ u[:, r] for of in taus]
        shares = [max(ALPHA, merged @ one / (one @ one)) for one in own]
        result += len(taus) / sum(shares) * sigma[r] * np.outer(u[:, r], vt[r])
    return result


def aim(tau: Array, name: str) -> Array:
    if name not in SEEN:
        return tau
    mean = inputs(name).double().abs().mean(0).numpy()
    return tau * (1 - mean / mean.max() * (1 - OMEGA))


def expected(folder: Path, steps: Sequence[Any], merged: Tensors, matrices: Sequence[str] = list(MATRICES)) -> Tensors:
    base, *experts = (load_file(file) for file in sorted(folder.glob("[be][ax][sp]*/model.safetensors")))
    found = dict(merged)
    for name in matrices:
        start = base[name].double().numpy()
        taus = [expert[name].double().numpy() - start for expert in experts]
        tau = merged[name].double().numpy() - start
        for step in steps:
            tau = svc(tau, taus) if step["method"] == "svc" else aim(tau, name)
        found[name] = torch.from_numpy(start + tau).float()
    return found


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "swudi"])
@pytest.mark.parametrize(
    "steps", [[SVC], [AIM], [SVC, AIM], [AIM, SVC]], ids=lambda s: "-".join(x["method"] for x in s)
)
def test_matrices_are_changed_as_the_papers_say_and_nothing_else_is(
    folder: Path, steps: list[Any], method: str
) -> None:
    merged, found = ours(config(folder, [], method)), ours(config(folder, steps, method))
    wanted = expected(folder, steps, merged)
    for name in SHAPES:
        if name in MATRICES:
            torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=2e-6)
        else:
            assert torch.equal(found[name], merged[name]), name


def test_the_order_is_that_of_the_config(folder: Path) -> None:
    one, other = ours(config(folder, [SVC, AIM])), ours(config(folder, [AIM, SVC]))
    assert all(float((one[name] - other[name]).abs().max()) > 1e-4 for name in SEEN)


def test_the_number_of_shards_does_not_matter(folder: Path) -> None:
    given = config(folder, [SVC, AIM])
    one, three = (read(combine(plan_of(given), folder / f"by{shards}", shards)) for shards in (1, 3))
    assert all(torch.equal(one[name], three[name]) for name in SHAPES)


def test_excluded_tensors_stay_those_of_the_base(folder: Path) -> None:
    name = SEEN[0]
    found = ours(config(folder, [SVC, AIM], exclude=[name]))
    assert torch.equal(found[name], load_file(folder / "base" / "model.safetensors")[name])


def test_the_result_is_rounded_once(folder: Path) -> None:
    exact, rounded = (ours(config(folder, [SVC, AIM], out_dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in SHAPES)


def test_statistics_of_another_shape_are_refused(folder: Path, tmp_path: Path) -> None:
    writer = StatisticsWriter(LocalFolder(tmp_path))
    x = noise((TOKENS, 5), 1)
    writer.moments([((SEEN[0],), Moments(TOKENS, x.square().sum(0), x.abs().sum(0)))])
    writer.finish(base={}, model={}, data="0" * 64, sequences=4, tokens=TOKENS, dtype="float32", kinds=("activations",))
    with refused(CheckpointError, where=str(tmp_path)):
        combine(plan_of(config(folder, [AIM]), f"base_statistics={tmp_path}"), tmp_path / "out")


def test_a_merge_that_is_not_finite_is_named(folder: Path, tmp_path: Path) -> None:
    name = SEEN[1]
    write_arrays(tmp_path, EXPERTS)
    damage(tmp_path / "expert1", name)
    with refused(RunError, where=name, do="check"):
        combine(plan_of(config(tmp_path, [SVC])), tmp_path / "out")


def damage(expert: Path, name: str) -> None:
    tensors = load_file(expert / "model.safetensors")
    tensors[name][0, 0] = torch.inf
    safetensors.torch.save_file(tensors, expert / "model.safetensors", {"format": "pt"})


def matrices(plan: Plan) -> list[str]:
    """Return the matrices of a Llama that are neither its embedding nor its head."""
    return [name for name in plan.merged if name.endswith("_proj.weight")]


def write(plan: Plan, folder: Path, calls: Callable[[Shard, LocalFolder, OutputFile], None]) -> Tensors:
    """Return the output of which the shard writes each file by a call."""
    folder.mkdir(exist_ok=True)
    worker = Shard(plan, 0, LocalFolder(folder / "state"))
    for file in output_files(plan):
        calls(worker, LocalFolder(folder), file)
    return read(folder)


def test_a_learned_merge_has_the_steps_too(llama_merge: Path, tmp_path: Path) -> None:
    def learned(shard: Shard, output: LocalFolder, file: OutputFile) -> None:
        values = Coefficients.constant(first_stage(plan).layout, plan.priors)
        names = [tensor.name for tensor in file.tensors if tensor.name in plan.merged_set]
        shard.write(output, file, {name: values.of(name) for name in names})

    plan = plan_of(llama_merge, "parameters.task_vectors=whole")
    merged = write(plan, tmp_path / "merged", learned)
    plan = plan_of(llama_merge, "parameters.task_vectors=whole", f"calibrate={{method: svc, alpha: {ALPHA}}}")
    found = write(plan, tmp_path / "found", learned)
    wanted = expected(llama_merge.parent, [SVC], merged, matrices(plan))
    assert {name for name in found if not torch.equal(found[name], merged[name])} == set(matrices(plan))
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=2e-6)


def test_steps_after_the_solution_of_layers_change_what_is_solved(llama_merge: Path, tmp_path: Path) -> None:
    plan = plan_of(llama_merge, "merge_method=task_arithmetic", f"calibrate=[featcal, {{method: svc, alpha: {ALPHA}}}]")
    first, *_ = names = matrices(plan)
    store_mean(plan, state := LocalFolder(tmp_path / "out" / "state"))
    solution = load_merged(state, first) + noise(plan.base_header.tensors[first].shape, 3, 0.01)
    save_tensors(state, solved_file(first), {"tensor": solution})
    before = {name: load_calibrated(state, name) for name in plan.base_header.tensors}
    assert torch.equal(before[first], solution)
    found = write(plan, tmp_path / "out", lambda shard, output, file: shard.calibrated(output, file))
    wanted = expected(llama_merge.parent, [SVC], before, names)
    assert {name for name in found if not torch.equal(found[name], before[name])} == set(names)
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=2e-6)


def test_steps_before_the_solution_of_layers_are_in_the_merged_model(llama_merge: Path, tmp_path: Path) -> None:
    options = "merge_method=task_arithmetic", f"calibrate=[{{method: svc, alpha: {ALPHA}}}, featcal]"
    plan = plan_of(llama_merge, *options)
    found = write(plan, tmp_path / "out", lambda shard, output, file: shard.combine(output, file))
    alone = plan_of(llama_merge, options[0], f"calibrate={{method: svc, alpha: {ALPHA}}}")
    wanted = write(alone, tmp_path / "alone", lambda shard, output, file: shard.combine(output, file))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    state = LocalFolder(tmp_path / "solved" / "state")
    for name, tensor in found.items():
        state.write(merged_file(name), safetensors.torch.save({name: tensor}))
    written = write(plan, tmp_path / "solved", lambda shard, output, file: shard.calibrated(output, file))
    assert all(torch.equal(written[name], found[name]) for name in found)


def test_an_expert_that_is_not_finite_is_named(make_merge: Callable[..., Path], tmp_path: Path) -> None:
    plan = plan_of(make_merge(), "merge_method=task_arithmetic", "calibrate=[featcal, svc]")
    name = matrices(plan)[2]
    store_mean(plan, LocalFolder(tmp_path / "out" / "state"))
    damage(Path(plan.experts[1].model), name)
    with refused(CheckpointError, where=plan.experts[1].name, facts=[name]):
        write(plan, tmp_path / "out", lambda shard, output, file: shard.calibrated(output, file))


@pytest.mark.parametrize(
    ("method", "steps", "before", "after"),
    [
        ("ties", "[svc, aim]", ["svc", "aim"], []),
        ("ties", "[svc, featcal, aim]", ["svc"], ["aim"]),
        ("ties", "[featcal, svc, aim]", [], ["svc", "aim"]),
        ("regmean_plus_plus", "[svc]", [], ["svc"]),
        ("expert_merging", "[aim, featcal]", ["aim"], []),
    ],
)
def test_which_steps_are_before_the_solution_of_layers_and_which_after(
    llama_merge: Path, method: str, steps: str, before: list[str], after: list[str]
) -> None:
    first, second = steps_around(plan_of(llama_merge, f"merge_method={method}", f"calibrate={steps}"))
    assert ([one.method for one in first], [one.method for one in second]) == (before, after)


def test_steps_their_order_and_their_options_are_part_of_what_a_run_is(llama_merge: Path) -> None:
    given = ("svc", "{method: svc, alpha: 0.2}", "[svc, featcal]", "[featcal, svc]", "[]")
    options = [identity(plan_of(llama_merge, f"calibrate={one}")).options for one in given]
    assert all(one != other for one, other in combinations(options, 2))


def test_the_memory_of_whole_matrices_is_in_the_plan(llama_merge: Path) -> None:
    without, with_steps = (step_bytes(plan_of(llama_merge, f"calibrate={one}"), 4) for one in ("featcal", "svc"))
    # Four matrices of the MLP at work, and four that wait to be written.
    assert (without, with_steps) == (0, 4 * 32 * 48 * 4 * (SVD_COPIES + 1))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft reads a deprecated attribute
def test_an_adapter_counts_as_the_checkpoint_that_it_makes(tmp_path: Path) -> None:
    built = build(tmp_path, tiny.make_model(), r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    shutil.copytree(built.base, tmp_path / "whole")
    safetensors.torch.save_file(
        {name: built.merged_tensors[name].contiguous() for name in built.base_tensors},
        tmp_path / "whole" / "model.safetensors",
        {"format": "pt"},
    )
    tiny.save(tiny.make_expert(tiny.make_model(), seed=5), tmp_path / "other")
    options: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": "base", "calibrate": SVC}
    found = []
    for expert in ("adapter", "whole"):
        models = [{"model": name, "parameters": {"weight": 0.7}} for name in (expert, "other")]
        found.append(ours(write_config(tmp_path, models=models, **options)))
    for name, tensor in found[1].items():
        torch.testing.assert_close(found[0][name], tensor, rtol=0, atol=1e-5)
