"""Orthogonal task vectors: closed forms, TSV-Merge as their sum, unchanged tensors, and the stored files."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import peft
import pytest
import torch
from conftest import plan_of
from errors import refused
from object_store import Store
from plain import Received, task_vectors
from safetensors.torch import load_file, save_file
from tolerance import assert_within, moved, unit
from transformers import AutoModelForCausalLM
from weight_space import combine, read

from engine.errors import DamagedError
from engine.methods.arithmetic import matrices
from engine.planning.factors import factor_bytes, ranks
from engine.planning.plan import Plan
from engine.shards.local_shards import LocalShards
from engine.shards.orthogonal import TASK_VECTOR_SCALE, file_name, orthogonalise, with_orthogonal
from engine.storage.folder import Folder
from engine.storage.local_folder import LocalFolder
from engine.storage.object_folder import ObjectFolder
from engine.storage.sealed import digest_name
from engine.task_vectors.coefficients import ChunkLayout, Coefficients
from engine.task_vectors.kinds import Product

Array = npt.NDArray[np.float64]
ORTHOGONAL = "parameters.task_vectors=orthogonal"
Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def dense(plan: Plan, state: Folder | None, name: str) -> list[Array | None]:
    """Return each expert's task vector in float64: the orthogonal one stored in `state`, or the expert's own."""
    own = task_vectors(plan)
    streams = own if state is None else with_orthogonal(plan, own, state)
    base = own.base.read(name)
    found: list[Array | None] = []
    for task_vector in streams.of(name):
        out = torch.empty(base.numel())
        if task_vector is not None:
            task_vector.block(0, base.numel(), base.reshape(-1).float(), out)
        found.append(None if task_vector is None else out.view(base.shape).double().numpy())
    return found


def stored(plan: Plan, folder: Path) -> LocalFolder:
    state = LocalFolder(folder / "state")
    orthogonalise(plan, task_vectors(plan), state, plan.orthogonal)
    return state


def closed_form(taus: list[Array], seen: Callable[[Array], Array] = lambda matrix: matrix) -> list[Array]:
    """Return TASK_VECTOR_SCALE · U⊥ₖ·Σₖ·V⊥ₖᵀ in float64, by inverse square roots instead of decompositions.

    `seen` is applied to each matrix before it is decomposed.
    """
    rank = min(taus[0].shape) // len(taus)
    parts = [leading(seen(tau), rank) for tau in taus]

    def nearest(matrix: Array) -> Array:
        matrix = seen(matrix)
        values, vectors = np.linalg.eigh(matrix.T @ matrix)
        near: Array = matrix @ (vectors / np.sqrt(values)) @ vectors.T
        return near

    left, right = (nearest(np.concatenate(some, axis=1)) for some in ([u for u, _, _ in parts], [v for *_, v in parts]))
    own = [slice(k * rank, (k + 1) * rank) for k in range(len(taus))]
    return [TASK_VECTOR_SCALE * (left[:, mine] * parts[k][1]) @ right[:, mine].T for k, mine in enumerate(own)]


def leading(tau: Array, rank: int) -> tuple[Array, Array, Array]:
    u, s, v = np.linalg.svd(tau, full_matrices=False)
    return u[:, :rank], s[:rank], v[:rank].T


def float32_error(taus: list[Array]) -> float:
    """Return the error bound of the closed form's elements for decompositions in float32.

    It is four times the largest change under perturbations of the size of a backward-stable decomposition's error. The
    change is largest where the singular values σᵣ and σᵣ₊₁, between which a matrix is cut, are close together, and
    where the concatenated parts of the experts are nearly dependent.
    """
    exact, generators = closed_form(taus), map(np.random.default_rng, range(3))
    others = [closed_form(taus, partial(moved, generator=generator)) for generator in generators]
    return 4 * max(float(np.abs(a - b).max()) for other in others for a, b in zip(other, exact, strict=True))


@pytest.mark.parametrize("experts", [2, 3])
def test_each_is_its_closed_form_and_orthogonal_to_the_others(
    make_merge: Callable[..., Path], tmp_path: Path, experts: int
) -> None:
    plan = plan_of(make_merge(experts=experts), ORTHOGONAL)
    state = stored(plan, tmp_path)
    assert set(plan.orthogonal) == plan.merged_set, "all merged tensors are matrices"
    for name in plan.merged:
        found = [tau for tau in dense(plan, state, name) if tau is not None]
        own = [tau for tau in dense(plan, None, name) if tau is not None]
        error = float32_error(own)
        for mine, wanted in zip(found, closed_form(own), strict=True):
            assert_within(mine, wanted, error, name)
        for a, b in pairwise(found):
            # For factors orthogonal within n·u at most 48 · 6e-8 = 3e-6; for whole task vectors 0.1 and more.
            size = np.linalg.norm(a) * np.linalg.norm(b)
            assert np.linalg.norm(a.T @ b) < 1e-5 * size
            assert np.linalg.norm(a @ b.T) < 1e-5 * size


def test_with_one_common_weight_their_sum_is_tsv_merge(make_merge: Callable[..., Path], tmp_path: Path) -> None:
    config = make_merge(experts=3)
    plan = plan_of(config, ORTHOGONAL)
    state = stored(plan, tmp_path)
    layout = ChunkLayout.make(plan.numels, dict.fromkeys(plan.merged, 1))
    received = Received(plan)
    shards = LocalShards(plan, threads=1, overlap=False, state=state)
    merged = received.all_of(shards.merge(Coefficients.constant(layout, [1.6 / TASK_VECTOR_SCALE] * 3), received))
    of_svd = read(combine(plan_of(config, "merge_method=svd", "parameters.lambda=1.6"), tmp_path / "svd"))
    base = load_file(config.parent / "base" / "model.safetensors")
    for name, tensor in merged.items():
        moved = (of_svd[name] - base[name]).abs().max()
        torch.testing.assert_close(tensor, of_svd[name].flatten(), atol=1e-5 * float(moved) + 1e-7, rtol=0)


def test_vectors_and_token_tensors_keep_their_task_vectors(make_merge: Callable[..., Path], tmp_path: Path) -> None:
    plan = plan_of(make_merge(exclude=[]), ORTHOGONAL)
    state = stored(plan, tmp_path)
    others = plan.merged_set - set(plan.orthogonal)
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= others
    for name in others:
        for a, b in zip(dense(plan, state, name), dense(plan, None, name), strict=True):
            np.testing.assert_array_equal(np.array(a), np.array(b))


def test_an_expert_that_has_the_base_s_matrix_takes_no_part(make_merge: Callable[..., Path], tmp_path: Path) -> None:
    config = make_merge(experts=3)
    path = config.parent / "expert1" / "model.safetensors"
    tensors = load_file(path)
    tensors[Q] = load_file(config.parent / "base" / "model.safetensors")[Q]
    save_file(tensors, path, metadata={"format": "pt"})
    plan = plan_of(config, ORTHOGONAL)
    first, second, third = dense(plan, stored(plan, tmp_path), Q)
    assert second is None and first is not None and third is not None
    rank = min(first.shape) // 3
    assert np.linalg.matrix_rank(first, tol=1e-5 * np.linalg.norm(first)) == rank, (
        "the rank depends on the number of all experts"
    )


def spectrum(shape: tuple[int, int], rank: int, seed: int, rest: float) -> tuple[Array, Array, Array]:
    """Return U, Σ, V of a random matrix with `rank` parts between 1 and 2 and others of the size `rest`."""
    generator, smaller = np.random.default_rng(seed), min(shape)
    u, v = (np.linalg.qr(generator.normal(size=(side, smaller)))[0] for side in shape)
    return u, np.where(np.arange(smaller) < rank, np.linspace(2, 1, smaller), rest), v


def degenerate(case: str, shape: tuple[int, int], rank: int) -> list[Array]:
    """Return three task vectors whose leading `rank` parts are dependent."""
    (u, s, v), (other_u, _, other_v) = (spectrum(shape, rank, seed, 0.01) for seed in (1, 2))
    first, second = (u * s) @ v.T, (other_u * s) @ other_v.T
    third = (spectrum(shape, rank, 3, 0.01)[0] * s) @ v.T
    return {
        "equal": [first, first, second],
        "all equal": [first, first, first],
        # Rounded in other places.
        "multiples": [first, 3 * first, second],
        "nearly equal": [first, first + 1e-7 * second, second],
        "opposite": [first, -first, second],
        "one is zero": [first, np.zeros(shape), first],
        "common rows": [first, third, second],
        "of low rank": [(u[:, :2] * s[:2]) @ v[:, :2].T, (other_u[:, :2] * s[:2]) @ v[:, :2].T, second],
        "in the span of the others": [first, second, ((u + other_u)[:, :rank] @ (v + other_v)[:, :rank].T) / 2],
    }[case]


def without_null(taus: list[Array], rank: int) -> list[Array]:
    """Return the closed form in float64 without the null directions of the concatenated parts.

    Parts that are zero by the rounding of float32 are left out.
    """
    parts = []
    for tau in taus:
        u, s, v = leading(tau, rank)
        kept = s > s[0] * max(tau.shape) * 2 * unit()
        parts.append((u[:, kept], s[kept], v[:, kept]))

    def nearest(matrix: Array) -> Array:
        p, d, q = np.linalg.svd(matrix, full_matrices=False)
        kept = d > 1e-5 * d[0]
        near: Array = p[:, kept] @ q[kept]
        return near

    left, right = (nearest(np.concatenate(some, axis=1)) for some in ([u for u, _, _ in parts], [v for *_, v in parts]))
    ends = np.cumsum([len(s) for _, s, _ in parts])
    own = [slice(end - len(s), end) for end, (_, s, _) in zip(ends, parts, strict=True)]
    return [
        TASK_VECTOR_SCALE * (left[:, mine] * s) @ right[:, mine].T for mine, (_, s, _) in zip(own, parts, strict=True)
    ]


@pytest.mark.parametrize(
    "case",
    [
        "equal",
        "all equal",
        "multiples",
        "nearly equal",
        "opposite",
        "one is zero",
        "common rows",
        "of low rank",
        "in the span of the others",
    ],
)
@pytest.mark.parametrize("name", [Q, DOWN])
def test_dependent_experts_share_directions_and_get_no_noise(
    make_merge: Callable[..., Path], tmp_path: Path, case: str, name: str
) -> None:
    config = make_merge(experts=3)
    base = load_file(config.parent / "base" / "model.safetensors")[name]
    rank = min(base.shape) // 3
    for k, tau in enumerate(degenerate(case, (base.shape[0], base.shape[1]), rank)):
        path = config.parent / f"expert{k}" / "model.safetensors"
        save_file(load_file(path) | {name: base + torch.from_numpy(tau).float()}, path, metadata={"format": "pt"})
    plan = plan_of(config, ORTHOGONAL)
    own = [tau if tau is not None and tau.any() else None for tau in dense(plan, None, name)]
    changed = [tau for tau in own if tau is not None]
    wanted = iter(without_null(changed, rank))
    # A decomposition in float32 turns the parts, of which the smallest is 1, by n·u; factors and product likewise.
    error = 8 * max(base.shape) * unit() * TASK_VECTOR_SCALE * max(np.linalg.norm(tau, 2) for tau in changed)
    for tau, mine in zip(own, dense(plan, stored(plan, tmp_path), name), strict=True):
        assert (mine is None) == (tau is None)
        if mine is not None:
            assert_within(mine, next(wanted), error, case)


def test_of_equal_experts_each_gets_its_share(make_merge: Callable[..., Path], tmp_path: Path) -> None:
    config = make_merge(experts=2)
    shutil.copy(config.parent / "expert0" / "model.safetensors", config.parent / "expert1" / "model.safetensors")
    plan = plan_of(config, ORTHOGONAL)
    state = stored(plan, tmp_path)
    for name in plan.merged:
        own = [tau for tau in dense(plan, None, name) if tau is not None]
        u, s, v = leading(own[0], min(own[0].shape) // 2)
        shared = TASK_VECTOR_SCALE / 2 * (u * s) @ v.T
        for mine in dense(plan, state, name):
            assert mine is not None
            # Four times the change under a perturbation of the size of a decomposition's error, as in float32_error.
            other = leading(moved(own[0], np.random.default_rng(0)), len(s))
            change = float(np.abs(TASK_VECTOR_SCALE / 2 * (other[0] * other[1]) @ other[2].T - shared).max())
            assert_within(mine, shared, 4 * change, name)


def test_independent_experts_keep_the_bits_of_the_whole_product() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [matrices.leading(torch.randn(48, 40, generator=generator), 13) for _ in range(3)]
    left, _, right = matrices.orthogonal_parts(parts)
    for found, stack in [
        (left, torch.cat([u for u, _, _ in parts], dim=1)),
        (right, torch.cat([v for *_, v in parts])),
    ]:
        p, _, q = torch.linalg.svd(stack, full_matrices=False)
        assert torch.equal(found, p @ q)


def test_a_matrix_that_no_expert_changes_has_no_task_vectors(make_merge: Callable[..., Path], tmp_path: Path) -> None:
    config = make_merge(experts=2)
    base = load_file(config.parent / "base" / "model.safetensors")[Q]
    for k in range(2):
        path = config.parent / f"expert{k}" / "model.safetensors"
        save_file(load_file(path) | {Q: base}, path, metadata={"format": "pt"})
    plan = plan_of(config, ORTHOGONAL)
    assert dense(plan, stored(plan, tmp_path), Q) == [None, None]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft reads a deprecated attribute
def with_adapter(config: Path, rank: int) -> None:
    """Replace the second expert by an adapter of the query matrices."""
    target = config.parent / "expert1"
    shutil.rmtree(target)
    torch.manual_seed(0)
    options = peft.LoraConfig(r=rank, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(config.parent / "base"), options).save_pretrained(target)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft reads a deprecated attribute
def test_an_adapter_s_part_has_its_own_rank(make_merge: Callable[..., Path], tmp_path: Path) -> None:
    config, rank = make_merge(experts=3), 4
    with_adapter(config, rank)
    plan = plan_of(config, ORTHOGONAL)
    state = stored(plan, tmp_path)
    own = [tau for tau in dense(plan, None, Q) if tau is not None]
    assert np.linalg.matrix_rank(own[1], tol=1e-5) == rank
    taus = dense(plan, state, Q)
    assert taus[0] is not None and taus[1] is not None
    assert np.linalg.matrix_rank(taus[1], tol=1e-5) == rank
    assert np.linalg.norm(taus[0].T @ taus[1]) < 1e-5 * np.linalg.norm(taus[0]) * np.linalg.norm(taus[1])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft reads a deprecated attribute
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_factors_are_the_same_task_vectors(make_merge: Callable[..., Path], tmp_path: Path, dtype: str) -> None:
    config = make_merge(experts=3)
    with_adapter(config, 4)
    plan = plan_of(config, ORTHOGONAL, f"dtype={dtype}")
    states = {folder: LocalFolder(tmp_path / folder) for folder in ("whole", "factors")}
    orthogonalise(plan, task_vectors(plan), states["whole"], plan.orthogonal)
    orthogonalise(plan, task_vectors(plan), states["factors"], plan.orthogonal, plan.orthogonal)
    smaller = min(plan.base_header.tensors[Q].shape)
    kept = load_file(tmp_path / "factors" / file_name(Q))
    assert kept["ranks"].tolist() == [smaller // 3, 4, smaller // 3] == ranks(plan, Q)
    assert kept["left"].dtype == kept["right"].dtype == getattr(torch, dtype)
    nbytes = sum(
        tensor.nbytes
        for name in plan.orthogonal
        for key, tensor in load_file(tmp_path / "factors" / file_name(name)).items()
        if key != "ranks"
    )
    assert nbytes == factor_bytes(plan, plan.orthogonal)
    # Two factors are rounded, or one product.
    error = 4 * unit(getattr(torch, dtype))
    for name in plan.orthogonal:
        for one, other in zip(dense(plan, states["factors"], name), dense(plan, states["whole"], name), strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert np.linalg.norm(one - other) <= error * np.linalg.norm(other)


@pytest.mark.parametrize(("shape", "q"), [((40, 70), 8), ((70, 40), 8), ((6, 9), 8), ((9, 6), 12), ((40, 1), 4)])
def test_the_parts_of_a_product_are_those_of_the_matrix(shape: tuple[int, int], q: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, generator=generator) for size in ((shape[0], q), (q, shape[1])))
    left[:, 1] = left[:, 0]  # of a rank below q
    exact = torch.linalg.svdvals(left.double() @ right.double())
    for rank in (1, 3, 100):
        u, s, vt = matrices.leading_of_product(left, right, rank)
        assert len(s) == min(rank, q - 1, *shape) and u.dtype == s.dtype == vt.dtype == torch.float32
        torch.testing.assert_close(s.double(), exact[: len(s)], rtol=1e-6, atol=0)
        for side in (u.T @ u, vt @ vt.T):
            torch.testing.assert_close(side, torch.eye(len(s)), rtol=0, atol=1e-6)
        cut = left.double() @ right.double() - (u.double() * s) @ vt.double()
        wanted = exact[len(s) :].square().sum().sqrt()
        torch.testing.assert_close(cut.norm(), wanted, rtol=1e-4, atol=1e-6 * float(exact[0]))


def test_an_adapter_without_effect_has_no_parts() -> None:
    nothing = Product(torch.zeros(5, 2), torch.randn(2, 7))
    assert matrices.leading_parts(nothing, torch.ones(5, 7), 2) is None
    assert matrices.leading_parts(None, torch.ones(5, 7), 2) is None


def test_models_of_16_bits_keep_them_in_bfloat16(make_merge: Callable[..., Path], tmp_path: Path) -> None:
    config = make_merge(dtype=torch.bfloat16)
    plan = plan_of(config, ORTHOGONAL)
    state = stored(plan, tmp_path)
    assert load_file(tmp_path / "state" / file_name(Q))["0"].dtype == torch.bfloat16
    own = [tau for tau in dense(plan, None, Q) if tau is not None]
    for mine, wanted in zip(dense(plan, state, Q), closed_form(own), strict=True):
        assert mine is not None
        # The float32 result is rounded to bfloat16 once.
        assert_within(mine, wanted, float32_error(own) + unit(torch.bfloat16) * np.abs(mine))


def test_stored_task_vectors_are_not_computed_again(make_merge: Callable[..., Path], tmp_path: Path) -> None:
    plan = plan_of(make_merge(), ORTHOGONAL)
    state = stored(plan, tmp_path)
    before = {name: (tmp_path / "state" / name).stat().st_mtime_ns for name in state.names("orthogonal")}
    assert set(before) == {file_name(name) for name in plan.merged}
    (tmp_path / "state" / file_name(Q)).unlink()
    stored(plan, tmp_path)
    after = {name: (tmp_path / "state" / name).stat().st_mtime_ns for name in state.names("orthogonal")}
    assert {name for name in before if before[name] != after[name]} == {file_name(Q)}


def test_reading_from_object_storage_leaves_no_copies(
    make_merge: Callable[..., Path], store: Store, tmp_path: Path
) -> None:
    plan = plan_of(make_merge(), ORTHOGONAL)
    on_disk = stored(plan, tmp_path)
    remote = ObjectFolder(f"{store.root}/a run{store.options}")
    orthogonalise(plan, task_vectors(plan), remote, plan.orthogonal)
    for name in plan.merged:
        for a, b in zip(dense(plan, remote, name), dense(plan, on_disk, name), strict=True):
            np.testing.assert_array_equal(np.array(a), np.array(b))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["../../elsewhere", "/etc/x", "a\0b", "x" * 10_000])
def test_a_tensor_s_name_is_not_part_of_its_path(name: str) -> None:
    assert re.fullmatch(r"orthogonal/[0-9a-f]{64}\.safetensors", file_name(name))


def test_whole_task_vectors_are_the_streams_themselves(llama_merge: Path) -> None:
    plan = plan_of(llama_merge)
    streams = task_vectors(plan)
    assert plan.orthogonal == () and with_orthogonal(plan, streams, None) is streams


@pytest.mark.parametrize("change", [lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: b"", None])
def test_a_damaged_file_is_refused_removed_and_computed_again(
    llama_merge: Path, tmp_path: Path, change: Callable[[bytes], bytes] | None
) -> None:
    plan = plan_of(llama_merge, ORTHOGONAL)
    state = stored(plan, tmp_path)
    name, whole = file_name(Q), state.read(file_name(Q))
    if change is None:
        state.remove(digest_name(name))  # the process died before it wrote the checksum
    else:
        state.write(name, change(whole))
        with refused(DamagedError, where=name):
            dense(plan, state, Q)
        assert not state.exists(name)
    orthogonalise(plan, task_vectors(plan), state, plan.orthogonal)
    assert state.read(name) == whole
    assert len(dense(plan, state, Q)) == 2
