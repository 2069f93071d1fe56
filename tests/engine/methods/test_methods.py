"""The native methods, compared with literal float64 implementations of their papers' formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import cut_small, plan_of
from errors import refused
from thorough import as_thorough, thorough_but
from tolerance import unit
from torch import Tensor
from weight_space import (
    MATRICES,
    SHAPES,
    Tensors,
    combine,
    difference,
    entries,
    noise,
    ours,
    read,
    worst,
    write_arrays,
    write_checkpoint,
    write_config,
)

import engine.methods.arithmetic.tensor
from engine.errors import InputError, MergeError, RunError
from engine.methods.arithmetic.sparse import Thinned

pytestmark = pytest.mark.usefixtures("one_thread")

# Tolerance relative to the largest element of the merged task vector: two decompositions in series, each exact for a
# matrix n·u·‖τ‖₂ away with n = 23, cut where singular values fall by 0.85 (see `write_arrays`), which moves a part
# 1 / (1 - 0.85) as far.
RELATIVE = 2 * 23 * unit() / (1 - 0.85)
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16


def isotropic(taus_Kmn: Tensor) -> Tensor:
    """Iso-C: the sum of the task vectors with each singular value replaced by their mean."""
    u, s, vt = torch.linalg.svd(taus_Kmn.sum(0), full_matrices=False)
    return u @ torch.diag(torch.full_like(s, s.mean().item())) @ vt


def task_singular_vectors(taus_Kmn: Tensor, rank: float = 0.0) -> Tensor:
    """TSV-M: leading parts concatenated, both sides made orthogonal by Procrustes."""
    parts = [torch.linalg.svd(tau, full_matrices=False) for tau in taus_Kmn]
    r = max(1, int(min(taus_Kmn.shape[1:]) * (rank or 1 / len(taus_Kmn))))
    u = torch.cat([u[:, :r] for u, _, _ in parts], dim=1)
    s = torch.cat([s[:r] for _, s, _ in parts])
    v = torch.cat([vt[:r].T for _, _, vt in parts], dim=1)
    (pu, _, qu), (pv, _, qv) = (torch.linalg.svd(side, full_matrices=False) for side in (u, v))
    return (pu @ qu) @ torch.diag(s) @ (pv @ qv).T


def leading(tau_mn: Tensor, r: int) -> Tensor:
    """The best approximation of rank r."""
    u, s, vt = torch.linalg.svd(tau_mn, full_matrices=False)
    return u[:, :r] @ torch.diag(s[:r]) @ vt[:r]


def wudi(taus_Kmn: Tensor, steps: int = 300, learning_rate: float = 1e-5) -> Tensor:
    """WUDI: the loss as in the paper, differentiated by autograd."""
    return descend(taus_Kmn, taus_Kmn, taus_Kmn, taus_Kmn.sum(0), steps, learning_rate)


def wudi2(
    taus_Kmn: Tensor,
    steps: int = 300,
    learning_rate: float = 1e-5,
    center: bool = True,
    start: str = "sum",
    optimizer: str = "adam",
    count: int = 0,
) -> Tensor:
    """WUDI v2: the task vectors cut to rank min(m, n)/K; `count` also includes experts whose task vector is zero."""
    count = count or len(taus_Kmn)
    mean = taus_Kmn.sum(0) / count
    r = min(taus_Kmn.shape[1:]) // count
    middle = mean if center else torch.zeros_like(mean)
    targets = torch.stack([leading(tau - middle, r) + middle for tau in taus_Kmn])
    directions = []
    for tau in taus_Kmn:
        _, s, vt = torch.linalg.svd(tau, full_matrices=False)
        directions.append(torch.diag(s[:r]) @ vt[:r])
    begin = taus_Kmn.sum(0) if start == "sum" else mean
    return descend(taus_Kmn, targets, torch.stack(directions), begin, steps, learning_rate, optimizer)


def descend(
    taus_Kmn: Tensor,
    targets_Kmn: Tensor,
    directions_Krn: Tensor,
    start: Tensor,
    steps: int,
    learning_rate: float,
    optimizer: str = "adam",
) -> Tensor:
    merged = torch.nn.Parameter(start.clone())
    by = (
        torch.optim.Adam([merged], lr=learning_rate)
        if optimizer == "adam"
        else torch.optim.SGD([merged], lr=learning_rate, momentum=0.9)
    )
    norms = taus_Kmn.flatten(1).norm(dim=1).square()
    for _ in range(steps):
        interference = (merged.unsqueeze(0) - targets_Kmn) @ directions_Krn.transpose(1, 2)
        loss = (interference.square() / norms[:, None, None]).sum()
        by.zero_grad()
        loss.backward()
        by.step()
    return merged.detach()


def swudi(
    taus_Kmn: Tensor,
    time: float = 300,
    rank: float = 0.85,
    cut: str = "",
    start: str = "sum",
    start_scale: float = 1.0,
    count: int = 0,
) -> Tensor:
    """SWUDI: of the gradient flow from the start, the part along the leading right singular vectors of all experts.

    The flow is dτ/dt = D − τ·C, whose solution is τ(t) = D·C⁺ + (τ₀ − D·C⁺)·exp(−C·t); without a time, D·C⁺.
    """
    count = count or len(taus_Kmn)
    norms = taus_Kmn.flatten(1).norm(dim=1)[:, None, None]
    c = (taus_Kmn.transpose(1, 2) @ taus_Kmn / norms**2).sum(0)
    d = (taus_Kmn @ taus_Kmn.transpose(1, 2) @ taus_Kmn / norms**2).sum(0)
    begin = {"sum": taus_Kmn.sum(0), "mean": taus_Kmn.sum(0) / count, "zero": torch.zeros_like(d)}[start] * start_scale
    _, s, vt = torch.linalg.svd((taus_Kmn / norms).flatten(0, 1), full_matrices=False)
    rows, columns = count * taus_Kmn.shape[1], taus_Kmn.shape[2]
    kept = math.ceil(rank * columns)
    if cut == "participation":
        kept = math.ceil(s.sum() ** 2 / s.square().sum())
    elif cut == "gavish_donoho":
        all_of_them = torch.cat([s, torch.zeros(min(rows, columns) - len(s), dtype=s.dtype)])
        beta = min(rows, columns) / max(rows, columns)
        kept = int((s > (0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43) * all_of_them.median()).sum())
    v = vt[: min(kept, int((s.square() >= 1e-8).sum()))].T
    end = d @ torch.linalg.pinv(c, hermitian=True)
    moved = end - begin if cut else (end - begin) @ (torch.eye(columns, dtype=c.dtype) - torch.matrix_exp(-c * time))
    return begin + moved @ v @ v.T


Dense = Callable[..., Tensor]
# Method, its options other than λ, and its function of the stacked task vectors of a matrix.
CASES: dict[str, tuple[str, dict[str, Any], Dense]] = {
    "iso": ("iso", {}, isotropic),
    "svd": ("svd", {}, task_singular_vectors),
    "svd-rank": ("svd", {"rank": 0.2}, task_singular_vectors),
    "wudi": ("wudi", {}, wudi),
    "wudi-steps": ("wudi", {"steps": 20, "learning_rate": 1e-3}, wudi),
    "wudi-no-step": ("wudi", {"steps": 0}, wudi),
    "wudi2": ("wudi2", {}, wudi2),
    "wudi2-adapters": (
        "wudi2",
        {"center": False, "start": "mean", "optimizer": "sgd", "learning_rate": 1e-4},
        wudi2,
    ),
    "wudi2-mixed": ("wudi2", {"center": True, "start": "mean", "optimizer": "adam", "steps": 50}, wudi2),
    "swudi": ("swudi", {}, swudi),
    "swudi-mean": ("swudi", {"time": 2.5, "rank": 0.4, "start": "mean", "start_scale": 0.3}, swudi),
    "swudi-start": ("swudi", {"time": 0.0}, swudi),
    "swudi_a": ("swudi_a", {"cut": "participation", "start": "zero"}, swudi),
    "swudi_a-threshold": ("swudi_a", {"cut": "gavish_donoho"}, swudi),
}
each_case = pytest.mark.parametrize("case", thorough_but(["iso", "svd", "wudi", "wudi2", "swudi", "swudi_a"], CASES))


def dense(base: Tensors, experts: list[Tensors], scale: float, of: Dense, **options: Any) -> Tensors:
    """Return θ₀ + λ·τ, where τ is `of` the stacked task vectors of a matrix, and the mean for other tensors.

    Unchanged experts count in the mean, but are left out of the stacked matrices.
    """
    result = {}
    for name, tensor in base.items():
        own = tensor.double()
        taus = torch.stack([expert[name].double() - own for expert in experts])
        changed = taus[taus.reshape(len(taus), -1).any(dim=1)]
        tau = (of(changed, **options) if len(changed) else torch.zeros_like(own)) if name in MATRICES else taus.mean(0)
        result[name] = own + scale * tau
    return result


def assert_near(found: Tensors, expected: Tensors, base: Tensors) -> None:
    worst({name: tensor.double() for name, tensor in found.items()}, expected)
    for name, tensor in expected.items():
        largest = (tensor - base[name].double()).abs().max().item()
        # The rounding of the sum with the base, in addition to that of the task vectors.
        rounding = 2.0**-23 * tensor.abs().max().item()
        assert difference(found[name], tensor) <= RELATIVE * largest + rounding, name


DTYPES = {
    "float32": [FLOAT32],
    "bfloat16": [BFLOAT16],
    "float16": [FLOAT16],
    "mixed": [BFLOAT16, FLOAT32, FLOAT16, BFLOAT16],
}


@pytest.mark.parametrize("dtypes", thorough_but(["mixed"], DTYPES))
@each_case
def test_matrices_and_others(case: str, dtypes: str, tmp_path: Path) -> None:
    method, options, of = CASES[case]
    base, experts = write_arrays(tmp_path, experts=3, dtypes=DTYPES[dtypes])
    config = write_config(
        tmp_path,
        merge_method=method,
        base_model="base",
        models=entries({}, {}, {}),
        parameters={**options, "lambda": 0.8},
        dtype="float32",
    )
    assert_near(ours(config), dense(base, experts, 0.8, of, **options), base)


@each_case
def test_one_expert_alone(case: str, tmp_path: Path) -> None:
    """The merge is the expert, except for Iso-C, which makes its singular values equal."""
    method, options, of = CASES[case]
    base, experts = write_arrays(tmp_path, experts=1)
    config = write_config(
        tmp_path, merge_method=method, base_model="base", models=entries({}), parameters=options | {"lambda": 1}
    )
    found = ours(config)
    assert_near(found, dense(base, experts, 1.0, of, **options), base)
    if method != "iso" and not {"rank", "cut"} & set(options):
        assert worst(found, experts[0]) <= 1e-6


@each_case
def test_more_experts_than_a_matrix_has_singular_values(case: str, tmp_path: Path) -> None:
    """Ranks are at least one, and the concatenated parts cannot be fully orthogonal."""
    method, options, _ = CASES[case]
    write_arrays(tmp_path, experts=11)
    config = write_config(
        tmp_path, merge_method=method, base_model="base", models=entries(*[{}] * 11), parameters=options
    )
    found = ours(config)
    assert set(found) == set(SHAPES) and all(tensor.isfinite().all() for tensor in found.values())


@each_case
def test_an_expert_that_is_the_base_adds_nothing(case: str, tmp_path: Path) -> None:
    """It adds nothing to matrices, but counts as an expert in means and for the rank 1/K."""
    method, options, of = CASES[case]
    counts = {"svd": {"rank": 1 / 3}, "wudi2": {"count": 3}, "swudi": {"count": 3}, "swudi_a": {"count": 3}}.get(
        method, {}
    )
    base, experts = write_arrays(tmp_path, experts=2)
    write_checkpoint(tmp_path / "expert2", base)
    config = write_config(
        tmp_path, merge_method=method, base_model="base", models=entries({}, {}, {}), parameters=options
    )
    assert_near(ours(config), dense(base, [*experts, base], 1.0, of, **counts | options), base)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        *((method, options) for method, options, _ in CASES.values()),
        ("weight_average", {}),
        ("linear", {"weight": 0.7}),
        ("task_arithmetic", {"weight": 0.7}),
        ("ties", {"weight": 0.7, "density": 0.3}),
        ("ties", {"weight": 0.7, "density": 0.3, "rescale": True, "trim": "model", "divide_by": "count"}),
        ("dare_linear", {"weight": 0.7, "density": 0.3}),
        ("dare_ties", {"weight": 0.7, "density": 0.3, "rescale_by": "density"}),
    ],
    ids=str,
)
def test_experts_that_are_the_base_give_the_base(method: str, parameters: dict[str, Any], tmp_path: Path) -> None:
    base, _ = write_arrays(tmp_path, experts=0)
    for k in range(2):
        write_checkpoint(tmp_path / f"expert{k}", base)
    config = write_config(
        tmp_path, merge_method=method, base_model="base", models=entries({}, {}), parameters=parameters
    )
    # A mean of equal numbers is rounded; a sum with zeros is not.
    limit = 1e-6 if method in ("linear", "weight_average") else 0.0
    assert worst(ours(config), base) <= limit


@pytest.mark.parametrize("rank", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_svd_intermediate_is_a_model_of_each_expert(rank: float, dtypes: str, tmp_path: Path) -> None:
    base, experts = write_arrays(tmp_path, experts=3, dtypes=DTYPES[dtypes])
    config = write_config(
        tmp_path,
        merge_method="svd_intermediate",
        base_model="base",
        models=entries({}, {}, {}),
        parameters={"rank": rank, "lambda": 0.9},
        dtype="float32",
    )
    for k, expert in enumerate(experts):
        expected = {}
        for name, tensor in base.items():
            tau = expert[name].double() - tensor.double()
            r = int(min(tau.shape) * (rank or 1 / 3)) if name in MATRICES else 0
            expected[name] = tensor.double() + 0.9 * (leading(tau, r) if name in MATRICES else tau)
        assert_near(ours(config, only=k), expected, base)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("with_base", [True, False])
def test_weight_average(with_base: bool, dtypes: str, tmp_path: Path) -> None:
    base, experts = write_arrays(tmp_path, experts=4, dtypes=DTYPES[dtypes])
    keys: dict[str, Any] = {"base_model": "base"} if with_base else {}
    config = write_config(tmp_path, merge_method="weight_average", models=entries(*[{}] * 4), dtype="float32", **keys)
    expected = {name: torch.stack([expert[name].double() for expert in experts]).mean(0) for name in base}
    assert worst({name: tensor.double() for name, tensor in ours(config).items()}, expected) <= 1e-6


def elected(taus: list[Tensor], weights: list[float], densities: list[float]) -> Tensor:
    """TIES with weights, as in mergekit."""
    kept = []
    for tau, density in zip(taus, densities, strict=True):
        count = max(1, int(density * tau.numel()))
        order = tau.abs().flatten().sort(descending=True, stable=True).indices[:count]
        kept.append(torch.zeros_like(tau).flatten().index_copy(0, order, tau.flatten()[order]).view(tau.shape))
    weighted = torch.stack([weight * tau for weight, tau in zip(weights, kept, strict=True)])
    agree = weighted.sign() == torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    divisor = (torch.tensor(weights).view(-1, *[1] * taus[0].dim()) * agree).sum(0)
    return (weighted * agree).sum(0) / torch.where(divisor == 0, 1.0, divisor)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear"])
def test_methods_of_sums(method: str, dtypes: str, tmp_path: Path) -> None:
    """Differences of 16-bit floats are exact in float32, so elements of equal magnitude are chosen alike."""
    base, experts = write_arrays(tmp_path, experts=3, dtypes=DTYPES[dtypes])
    weights, densities = [0.5, 0.2, 0.9], [0.3, 0.7, 1.0]
    own = [
        {"weight": w} | ({"density": d} if method == "ties" else {}) for w, d in zip(weights, densities, strict=True)
    ]
    config = write_config(tmp_path, merge_method=method, base_model="base", models=entries(*own), dtype="float32")
    expected = {}
    for name, tensor in base.items():
        taus = [expert[name].float().double() - tensor.double() for expert in experts]
        total = sum(w * tau for w, tau in zip(weights, taus, strict=True))
        if method == "linear":
            expected[name] = sum(w * e[name].double() for w, e in zip(weights, experts, strict=True)) / sum(weights)
        elif method == "ties":
            floats = [(expert[name].float() - tensor.float()).double() for expert in experts]
            expected[name] = tensor.double() + elected(floats, weights, densities)
        else:
            expected[name] = tensor.double() + total
    assert worst({name: tensor.double() for name, tensor in ours(config).items()}, expected) <= 1e-6


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
def test_the_output_has_the_bases_dtype_and_is_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    base, _ = write_arrays(tmp_path, experts=2, dtypes=[dtype, FLOAT32])
    keys = {"merge_method": "ties", "base_model": "base", "models": entries({}, {}), "parameters": {"weight": 0.4}}
    found = ours(write_config(tmp_path, **keys))
    exact = ours(write_config(tmp_path, **keys, dtype="float32"))
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert all(torch.equal(tensor, exact[name].to(dtype)) for name, tensor in found.items())
    assert any(not torch.equal(tensor, base[name]) for name, tensor in found.items())


# DARE's masks.

BIG = {"layers.0.a.weight": (250, 400), "layers.0.b.weight": (250, 400)}


def masks(folder: Path, method: str = "dare_linear", **keys: Any) -> dict[str, Tensor]:
    """Return the masks of kept elements, from a merge whose task vectors are one everywhere and not rescaled."""
    parameters = {"weight": 1, "rescale": False} | keys.pop("parameters", {})
    config = write_config(folder, merge_method=method, base_model="base", parameters=parameters, **keys)
    found = ours(config)
    assert all(set(tensor.unique().tolist()) <= {0.0, 1.0} for tensor in found.values())
    return {name: tensor == 1 for name, tensor in found.items()}


@pytest.fixture(scope="module")
def ones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a base of zeros and experts of ones."""
    folder = tmp_path_factory.mktemp("ones")
    write_checkpoint(folder / "base", {name: torch.zeros(shape) for name, shape in BIG.items()})
    for k in range(3):
        write_checkpoint(folder / f"expert{k}", {name: torch.ones(shape) for name, shape in BIG.items()})
    return folder


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_density_is_the_share_of_kept_elements(method: str, density: float, ones: Path) -> None:
    for name, kept in masks(ones, method, models=entries({"density": density})).items():
        deviation = (density * (1 - density) / kept.numel()) ** 0.5
        assert abs(kept.double().mean().item() - density) < 5 * deviation, name


@pytest.mark.parametrize("density", [0.1, 0.5, 0.8])
def test_masks_of_experts_tensors_seeds_and_neighbours_are_independent(density: float, ones: Path) -> None:
    own = {"density": density}
    a, b = BIG
    first, second = masks(ones, models=entries(own)), masks(ones, models=entries(own, first=1))
    other = masks(ones, models=entries(own), seed=1)
    pairs = {
        "expert": (first[a], second[a]),
        "tensor": (first[a], first[b]),
        "seed": (first[a], other[a]),
        "element": (first[a].flatten()[:-1], first[a].flatten()[1:]),
        "row": (first[a][:-1], first[a][1:]),
    }
    both = density**2
    for what, (one, another) in pairs.items():
        share = (one & another).double().mean().item()
        assert abs(share - both) < 5 * (both * (1 - both) / one.numel()) ** 0.5, what


def test_a_mask_does_not_depend_on_the_other_experts(ones: Path) -> None:
    """A mask depends on the seed and the names of expert and tensor, not on the expert's position."""
    own = {"density": 0.3, "weight": 1}
    alone = masks(ones, models=entries(own, first=1))
    beside = entries({"density": 1, "weight": 0}, own, {"density": 0.5, "weight": 0})
    assert all(torch.equal(mask, alone[name]) for name, mask in masks(ones, models=beside).items())
    turned = masks(ones, models=beside[::-1])
    assert all(torch.equal(mask, alone[name]) for name, mask in turned.items())


@pytest.mark.parametrize(
    ("block", "piece", "room"), [(400, 1200, 512), as_thorough((37, 999, 64)), (1 << 18, 1 << 22, 1 << 20)]
)
def test_a_mask_does_not_depend_on_blocks_and_pieces(
    block: int, piece: int, room: int, ones: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = entries({"density": 0.3, "weight": 1})
    whole = masks(ones, models=models)
    cut_small(monkeypatch, block, piece)
    monkeypatch.setattr(engine.methods.arithmetic.tensor, "ROOM", room)
    monkeypatch.setattr(engine.methods.arithmetic.tensor, "SMALLEST_BLOCK", room // 8)
    assert all(torch.equal(mask, whole[name]) for name, mask in masks(ones, models=models).items())


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_thinned_parts_are_those_of_the_whole(size: int) -> None:
    thinned, none = Thinned([2**64 - 1, 5], [0.4, 1.0]), np.zeros(0, dtype=np.int64)
    tau = noise((1000,), 0).numpy()
    whole, parts, kept = tau.copy(), tau.copy(), tau.copy()
    thinned.apply(0, 123, whole, none)
    for start in range(0, len(tau), size):
        thinned.apply(0, 123 + start, parts[start : start + size], none)
    thinned.apply(1, 0, kept, none)
    assert np.array_equal(whole, parts) and np.array_equal(kept, tau)
    assert 300 < np.count_nonzero(whole) < 500 and set(np.unique(whole)) <= {*tau, np.float32(0)}


@pytest.mark.parametrize("rescale", ["l1", "density"])
def test_dare_scales_what_stays(rescale: str, tmp_path: Path) -> None:
    """`l1` preserves the tensor's Σ|τ| for every mask; `density` preserves it in expectation."""
    base, experts = write_arrays(tmp_path, experts=1, shapes={"layers.0.a.weight": (100, 100)})
    config = write_config(
        tmp_path,
        merge_method="dare_linear",
        base_model="base",
        models=entries({"weight": 1, "density": 0.2}),
        parameters={"rescale_by": rescale},
    )
    name = next(iter(base))
    tau, merged = experts[0][name] - base[name], ours(config)[name] - base[name]
    stays = merged != 0
    factors = (merged[stays] / tau[stays]).double()
    expected = 5.0 if rescale == "density" else (tau.abs().sum() / tau[stays].abs().sum()).item()
    # The differences of numbers near one: small ones have few correct digits.
    large = tau[stays].abs() > 0.01
    assert (factors[large] / expected - 1).abs().max() < 1e-4
    assert (expected == 5.0) == (rescale == "density")
    assert abs(stays.double().mean().item() - 0.2) < 5 * 0.4 / 100


# NaN and infinite weights.

NATIVE = [
    ("weight_average", {}),
    ("linear", {"weight": 0.7}),
    ("task_arithmetic", {"weight": 0.7}),
    ("ties", {"weight": 0.7, "density": 0.5}),
    ("ties", {"weight": 0.7}),
    ("dare_linear", {"weight": 0.7, "density": 0.6}),
    ("dare_ties", {"weight": 0.7, "density": 0.6}),
    ("dare_ties", {"weight": 0.7, "density": 0.6, "rescale": False}),
    ("iso", {}),
    ("svd", {}),
    ("wudi", {"steps": 3}),
    ("wudi2", {"steps": 3}),
    ("swudi", {}),
    ("pcb", {}),
    ("doge", {"steps": 3}),
]


@pytest.mark.parametrize("name", ["layers.0.wide.weight", "layers.0.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), as_thorough(float("inf")), as_thorough(float("-inf"))])
@pytest.mark.parametrize(("method", "parameters"), NATIVE, ids=str)
def test_a_weight_that_is_not_finite_is_an_error_that_names_its_tensor(
    method: str, parameters: dict[str, Any], value: float, name: str, tmp_path: Path
) -> None:
    base, experts = write_arrays(tmp_path, experts=1)
    broken = {**experts[0], name: experts[0][name].clone()}
    broken[name].view(-1)[-2] = value
    write_checkpoint(tmp_path / "expert1", broken)
    config = write_config(
        tmp_path, merge_method=method, base_model="base", models=entries({}, {}), parameters=parameters
    )
    with refused(MergeError, facts=[name, "NaN"]) as caught:
        ours(config)
    assert isinstance(caught.value, RunError | InputError)
    assert base


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("task_arithmetic", {"parameters": {"weight": 1e6}, "out_dtype": "float16"}),
        ("task_arithmetic", {"parameters": {"weight": {"filter": "wide", "value": 1e7}}, "dtype": "float16"}),
        ("task_arithmetic", {"parameters": {"weight": 3e38}}),
        ("task_arithmetic", {"parameters": {"weight": 1e38, "lambda": 1e6}}),
        ("ties", {"parameters": {"weight": 1e39, "density": 0.5}}),
        ("dare_linear", {"parameters": {"weight": 1e39, "density": 0.5}}),
        ("wudi", {"parameters": {"lambda": 3e38}}),
    ],
    ids=str,
)
def test_a_sum_that_overflows_its_dtype_is_an_error_that_names_the_tensor(
    method: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    write_arrays(tmp_path, experts=1, scale=50, shapes={"layers.0.wide.weight": (9, 23)})
    config = write_config(tmp_path, merge_method=method, base_model="base", models=entries({}), **keys)
    # float32 is the widest, and needs no advice to widen it.
    advice = "out_dtype" if "float16" in keys.values() else "--fresh"
    with refused(RunError, where="layers.0.wide.weight", do=advice):
        ours(config)


def test_sums_that_overflow_where_no_element_does_are_fine(tmp_path: Path) -> None:
    """The sum of a thousand numbers of 10³⁷ overflows float32."""
    write_checkpoint(tmp_path / "base", {"layers.0.a.weight": torch.full((10, 100), 1e37)})
    write_checkpoint(tmp_path / "expert0", {"layers.0.a.weight": torch.full((10, 100), 2e37)})
    config = write_config(tmp_path, merge_method="weight_average", base_model="base", models=entries({}))
    assert torch.equal(
        read(combine(plan_of(config), tmp_path / "out"))["layers.0.a.weight"], torch.full((10, 100), 2e37)
    )
