"""The student: coefficient gradients against autograd and finite differences, and the same bits whenever weights arrive
and whether gradients leave or stay.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import LONG, cut_small, plan_of
from errors import refused
from fake_cuda import fake_cuda
from plain import Plain
from reference import Reference
from reference import pieces as reference_pieces
from thorough import as_thorough, thorough_but
from tolerance import bound
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import engine.learning.student
from engine.codec import unpack_all
from engine.errors import RunError
from engine.learning.losses import entropy_loss, logit_loss
from engine.learning.student import Losses, Student
from engine.learning.targets import Target
from engine.models.forward import blocks_of, decode
from engine.planning.plan import Plan, in_order_of_use
from engine.shards.local_shards import LocalShards
from engine.task_vectors.coefficients import ChunkLayout, Coefficients
from engine.task_vectors.pieces import Piece, pieces

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
Made = Callable[..., tuple[Plan, dict[tuple[int, int], Target]]]
# Of a gradient's largest element: it came through 7 matrices a block and the head, there and back, by sums of 64 terms
# at most, and each of them may be taken in any order.
GRADIENT = bound(2 * (7 * tiny.COMMON["num_hidden_layers"] + 1) * tiny.VOCAB, 1)
# Of a divergence at T = 1.5, T² · Σ p·(ln p − ln q): logarithms of about ln V, each of a sum of H terms and of 8 more
# roundings. Tokens' errors go either way, so that their mean has less.
DIVERGENCE = bound(tiny.COMMON["hidden_size"] + 8, 1.5**2 * math.log(tiny.VOCAB), safety=1)


def targets_of(plan: Plan, folder: Path) -> dict[tuple[int, int], Target]:
    return {at: Target.from_tensors(unpack_all(packed)) for at, packed in Plain(plan, folder).targets.items()}


@pytest.fixture(scope="module")
def setup(one_thread: None, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("student")
    config = tiny.make_merge(folder / "merge", parameters={"temperature": 1.5, "hidden_weight": 0.7})
    plan = plan_of(config)
    layout = ChunkLayout.make(plan.numels, {name: i % 4 for i, name in enumerate(plan.merged)})
    values = np.random.default_rng(0).uniform(0.1, 0.6, (2, layout.width))
    return config, plan, targets_of(plan, folder), Coefficients(layout, values)


@pytest.fixture(scope="module")
def made(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return a function that makes a merge's plan and targets, once for the same arguments. Read-only.

    `long`: the first sample of expert 1 is replaced by one of 40 tokens.
    """
    found: dict[str, tuple[Plan, dict[tuple[int, int], Target]]] = {}

    def make(family: str, long: bool = False, **options: Any) -> tuple[Plan, dict[tuple[int, int], Target]]:
        key = repr((family, long, options))
        if key not in found:
            folder = tmp_path_factory.mktemp("made")
            config = tiny.make_merge(folder / "merge", family, **options)
            if long:
                tiny.write_calibration(config.parent / "expert1.jsonl", 1, seed=5, length=40)
            plan = plan_of(config)
            found[key] = plan, targets_of(plan, folder)
        return found[key]

    return make


@pytest.fixture(scope="module")
def all_merged(setup, tmp_path_factory: pytest.TempPathFactory):
    """Return plan and targets of the merge of `setup` without excluded tensors."""
    plan = plan_of(setup[0], "exclude=[]")
    return plan, targets_of(plan, tmp_path_factory.mktemp("all-merged"))


def tokens_only(target: Target) -> Target:
    return Target(target.input_ids_T)


def constant(plan: Plan, weight: float) -> Coefficients:
    layout = ChunkLayout.make(plan.numels, dict.fromkeys(plan.merged, 1))
    return Coefficients.constant(layout, [weight] * len(plan.experts))


def loss_at(plan, student: Student, target: Target, coefficients: Coefficients) -> float:
    student.expect(LocalShards(plan, 1, overlap=False).merge(coefficients, student))
    (losses,) = student.accumulate([(target, 1.0)])
    take_gradients(student)
    return losses.kl + 0.7 * losses.hidden


def gradient(plan, student: Student, target: Target, coefficients: Coefficients) -> np.ndarray:
    shards = LocalShards(plan, 1, overlap=False)
    student.expect(shards.merge(coefficients, student))
    leaving = shards.gradients(coefficients.layout)
    student.accumulate([(target, 1.0)], leaving)
    return leaving.collect()


def filled(plan: Plan, coefficients: Coefficients | None = None) -> Student:
    """Return a student in which every merged tensor has arrived."""
    student = Student(plan, CPU)
    arrivals = LocalShards(plan, 1, overlap=False).merge(coefficients or constant(plan, 0.3), student)
    for future in (future for futures in arrivals.values() for future in futures):
        future.result(LONG)
    return student


def parameters(student: Student) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that are merged or have a merged part, by the module's names."""
    return {name: parameter for name, parameter in student.model.named_parameters() if parameter.requires_grad}


def take_gradients(student: Student) -> dict[str, Tensor]:
    """Remove the gradients from the merged parameters and return them."""
    gradients = {}
    for name, parameter in parameters(student).items():
        assert parameter.grad is not None, name
        gradients[name], parameter.grad = parameter.grad, None
    return gradients


def assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_coefficient_gradients_equal_autograd_through_the_composed_weights(setup) -> None:
    config, plan, targets, coefficients = setup
    got = gradient(plan, Student(plan, CPU), targets[1, 2], coefficients)

    reference = Reference(config)
    columns = coefficients.layout.columns
    alpha = {
        n: torch.tensor(coefficients.values[:, c], dtype=torch.float32).requires_grad_() for n, c in columns.items()
    }
    assert all(len(reference_pieces(plan.numels[n], alpha[n].shape[1])) == alpha[n].shape[1] for n in plan.merged)
    reference.loss(alpha, 1, 2).backward()
    for name, column in columns.items():
        expected = alpha[name].grad.numpy()
        np.testing.assert_allclose(got[:, column], expected, rtol=1e-3, atol=1e-5 * np.abs(got).max(), err_msg=name)


def test_the_gradient_of_the_entropy_equals_autograd_through_the_composed_weights(setup) -> None:
    """The plan's temperature, 1.5, must not affect the entropy."""
    config, plan, targets, coefficients = setup
    target = tokens_only(targets[1, 2])
    student, reference = Student(plan, CPU), Reference(config)
    got = gradient(plan, student, target, coefficients)
    columns = coefficients.layout.columns
    alpha = {
        n: torch.tensor(coefficients.values[:, c], dtype=torch.float32).requires_grad_() for n, c in columns.items()
    }
    output = functional_call(reference.model, reference.compose(alpha), (target.input_ids_T[None],))
    entropy = torch.distributions.Categorical(logits=output.logits[0]).entropy().mean()
    entropy.backward()
    for name, column in columns.items():
        expected = alpha[name].grad.numpy()
        np.testing.assert_allclose(got[:, column], expected, rtol=1e-3, atol=1e-5 * np.abs(got).max(), err_msg=name)

    (losses,) = student.accumulate([(target, 0.3)])
    assert losses == Losses(0.0, 0.0, losses.entropy)
    assert losses.entropy == pytest.approx(entropy.item(), rel=1e-5)
    (aligned,) = student.accumulate([(targets[1, 2], 0.3)])
    assert aligned.kl > 0 and aligned.hidden > 0 and aligned.entropy is None


def test_coefficient_gradients_equal_finite_differences(setup) -> None:
    _, plan, targets, coefficients = setup
    student, target = Student(plan, CPU), targets[0, 1]
    got = gradient(plan, student, target, coefficients)
    largest = np.argsort(-np.abs(got), axis=None)[:6]
    step = 1e-2
    for k, column in zip(*np.unravel_index(largest, got.shape), strict=True):
        values = {}
        for sign in (-1, 1):
            moved = coefficients.values.copy()
            moved[k, column] += sign * step
            values[sign] = loss_at(plan, student, target, Coefficients(coefficients.layout, moved))
        assert (values[1] - values[-1]) / (2 * step) == pytest.approx(got[k, column], rel=0.02)


def test_gradients_of_a_window_add_up(setup) -> None:
    _, plan, targets, coefficients = setup
    student = filled(plan, coefficients)
    leaving = LocalShards(plan, 1, overlap=False).gradients(coefficients.layout)
    student.accumulate([(targets[0, 0], 1.0)])
    student.accumulate([(targets[1, 0], 1.0)], leaving)
    apart = sum(gradient(plan, student, targets[at], coefficients) for at in ((0, 0), (1, 0)))
    np.testing.assert_allclose(leaving.collect(), apart, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", thorough_but(["llama", "gemma2"], tiny.FAMILIES))
@pytest.mark.parametrize("exclude", [None, []], ids=["by-default", "all-merged"])
@pytest.mark.parametrize("has_expert", [True, False], ids=["with-expert", "tokens-only"])
def test_samples_of_any_lengths_in_one_pass_give_the_losses_and_gradients_of_each_alone(
    made: Made, family: str, exclude: list[str] | None, has_expert: bool
) -> None:
    options = {} if exclude is None else {"exclude": exclude}
    # Longer than the attention window of the families that have one, and much longer than the other samples.
    plan, targets = made(family, long=True, experts=2, samples=(3, 1), **options)
    student = filled(plan)
    said = [target if has_expert else tokens_only(target) for target in targets.values()]
    samples = [(target, 0.1 + 0.2 * number) for number, target in enumerate(said)]
    assert {len(target.input_ids_T) for target, _ in samples} == {9, 10, 11, 40}
    alone = [student.accumulate([sample]) for sample in samples]
    apart = take_gradients(student)
    together = student.accumulate(samples)
    for (wanted,), found in zip(alone, together, strict=True):
        assert (found.kl, found.hidden) == pytest.approx((wanted.kl, wanted.hidden), rel=1e-4)
        assert (found.entropy or 0) == pytest.approx(wanted.entropy or 0, rel=1e-4)
        assert (found.entropy is None) == has_expert
    for name, gradient in take_gradients(student).items():
        scale = apart[name].abs().max().item()
        torch.testing.assert_close(gradient, apart[name], rtol=0, atol=GRADIENT * scale, msg=name)


def test_padding_does_not_count(setup) -> None:
    _, plan, targets, coefficients = setup
    student, samples = filled(plan, coefficients), [(targets[0, 2], 0.3), (targets[0, 0], 0.7)]
    lengths = [len(target.input_ids_T) for target, _ in samples]
    wanted, slopes = student.accumulate(samples), take_gradients(student)
    passes = []

    def fill_otherwise(_: object, __: object, inputs: dict[str, object]) -> tuple[tuple[()], dict[str, object]]:
        mask_BT = inputs.get("attention_mask")
        if not isinstance(mask_BT, Tensor):
            return (), inputs  # called by `rebuild_logits`
        assert mask_BT.sum(1).tolist() == lengths
        passes.append(mask_BT.shape)
        return (), inputs | {"input_ids": inputs["input_ids"].masked_fill(mask_BT == 0, 7)}

    student.model.base_model.register_forward_pre_hook(fill_otherwise, with_kwargs=True)
    assert student.accumulate(samples) == wanted
    assert_same_bits(take_gradients(student), slopes)
    assert passes == [(2, max(lengths))]


def test_a_perfect_match_has_no_loss_and_no_gradient(tmp_path: Path) -> None:
    config = tiny.make_merge(tmp_path / "merge", experts=1, exclude=["never"])
    plan = plan_of(config)
    student = filled(plan, constant(plan, 1.0))
    (losses,) = student.accumulate([(targets_of(plan, tmp_path)[0, 0], 1.0)])
    assert losses.kl == pytest.approx(0, abs=1e-6)
    assert losses.hidden == pytest.approx(0, abs=1e-8)
    assert max(gradient.abs().max() for gradient in take_gradients(student).values()) < 1e-5


def test_only_merged_parameters_have_a_gradient(setup) -> None:
    _, plan, targets, _ = setup
    student = filled(plan)
    student.accumulate([(targets[0, 0], 1.0)])
    with_gradient = {name for name, p in student.model.named_parameters() if p.grad is not None}
    assert with_gradient == set(plan.merged)


@pytest.mark.parametrize("convert", [lambda target: target, tokens_only], ids=["with-expert", "tokens-only"])
def test_a_loss_that_is_not_finite_is_an_error(setup, convert: Callable[[Target], Target]) -> None:
    _, plan, targets, _ = setup
    student = filled(plan)
    spoil(student)
    with refused(RunError, do="`learning_rate`", facts=["not finite"]):
        student.accumulate([(convert(targets[0, 0]), 1.0)])


class Looks(TorchDispatchMode):
    """Counts the times that our code looks at a tensor's values, for which it would wait for a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count, self.inside, tolist = 0, False, Tensor.tolist
        monkeypatch.setattr(Tensor, "tolist", lambda tensor: (self.look(), tolist(tensor))[1])

    def decode(self, *given: Any) -> Any:
        """Run the model's own code, which looks at the mask."""
        self.inside = True
        states = decode(*given)
        self.inside = False
        return states

    def look(self) -> None:
        self.count += not self.inside

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self.look()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("hidden_loss", ["mse", "relative"])
def test_a_pass_looks_at_its_losses_once(setup, monkeypatch: pytest.MonkeyPatch, hidden_loss: str) -> None:
    config, _, targets, _ = setup
    student = filled(plan_of(config, f"parameters.hidden_loss={hidden_loss}"))
    alike = [target for target in targets.values() if len(target.input_ids_T) == 10]
    samples = [(target, 0.5) for target in (*alike, *list(targets.values())[:2], tokens_only(alike[0]))]
    wanted = [student.accumulate([sample])[0] for sample in samples]
    for call in (lambda: student.accumulate(samples), lambda: student.measure([target for target, _ in samples])):
        with Looks(monkeypatch) as looks:
            monkeypatch.setattr(engine.learning.student, "decode", looks.decode)
            found = call()
        assert looks.count == 1
        for one, other in zip(found, wanted, strict=True):
            assert (one.kl, one.hidden) == pytest.approx((other.kl, other.hidden), rel=1e-4)


def test_the_buffer_of_a_piece_is_the_model_s_own_memory(setup, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plan, _, _ = setup
    cut_small(monkeypatch, block=100, piece=300)
    student = Student(plan, CPU)
    for name, parameter in parameters(student).items():
        cut = list(pieces(name, parameter.shape))
        assert len(cut) > 1
        for value, piece in enumerate(cut):
            buffer = student.buffer(piece)
            assert buffer.shape == (piece.numel,) and not buffer.requires_grad
            student.put(piece, buffer.fill_(value))
        numbers = [value for value, piece in enumerate(cut) for _ in range(piece.numel)]
        assert parameter.flatten().tolist() == numbers


# Weights that arrive during the forward pass.


def spoil(student: Student) -> None:
    """Fill the merged parameters with NaN, so that a pass with weights that have not arrived shows in its results."""
    with torch.no_grad():
        for parameter in parameters(student).values():
            parameter.fill_(torch.nan)


class Late:
    """Merged tensors that another thread puts into a student piece by piece, in a given order."""

    def __init__(self, plan: Plan, coefficients: Coefficients) -> None:
        source = parameters(filled(plan, coefficients))
        self.content = {
            piece: tensor.detach().flatten()[piece.start : piece.stop].clone()
            for name, tensor in source.items()
            for piece in pieces(name, tensor.shape)
        }

    def come(
        self, student: Student, order: Iterable[Piece], before: Callable[[Piece], object] = lambda _: None
    ) -> dict[str, list[Future[None]]]:
        spoil(student)
        futures = {piece: Future[None]() for piece in self.content}

        def bring() -> None:
            for piece in order:
                try:
                    before(piece)
                    buffer = student.buffer(piece)
                    buffer.copy_(self.content[piece])
                    student.put(piece, buffer)
                    futures[piece].set_result(None)
                except Exception as error:  # noqa: BLE001 - raised by the future's result()
                    futures[piece].set_exception(error)

        threading.Thread(target=bring, daemon=True).start()
        return {
            name: [future for piece, future in futures.items() if piece.name == name] for name in student.plan.merged
        }


ORDERS: dict[str, Callable[[list[Piece]], list[Piece]]] = {
    "as-used": lambda order: [
        piece for name in in_order_of_use({one.name for one in order}) for piece in order if piece.name == name
    ],
    "last-first": lambda order: order[::-1],
    "any": lambda order: random.Random(1).sample(order, len(order)),
    "any-other": lambda order: random.Random(2).sample(order, len(order)),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("exclude", [None, []], ids=["by-default", "all-merged"])
def test_weights_that_come_late_and_in_any_order_give_the_same_bits(
    setup, all_merged, monkeypatch: pytest.MonkeyPatch, order: str, exclude: list[str] | None
) -> None:
    plan, targets = setup[1:3] if exclude is None else all_merged
    cut_small(monkeypatch, block=100, piece=500)
    coefficients = constant(plan, 0.3)
    student, late = filled(plan, coefficients), Late(plan, coefficients)
    assert len(late.content) > 2 * len(plan.merged)
    wanted = student.accumulate([(targets[0, 1], 0.75)])
    slopes = take_gradients(student)
    pause = threading.Event()
    calls = []
    blocks_of(student.model)[2].register_forward_hook(lambda *_: calls.append(None))
    student.expect(late.come(student, ORDERS[order](list(late.content)), lambda _: pause.wait(1e-3)))
    assert student.accumulate([(targets[0, 1], 0.75)]) == wanted
    assert_same_bits(take_gradients(student), slopes)
    assert len(calls) == 1, "one pass is enough if every block was waited for"


def test_blocks_run_while_the_weights_of_later_ones_are_in_flight(setup) -> None:
    _, plan, targets, coefficients = setup
    student, late = filled(plan, coefficients), Late(plan, coefficients)
    wanted = student.accumulate([(targets[0, 0], 1.0)])
    slopes = take_gradients(student)
    done = [threading.Event() for _ in range(3)]
    for event, block in zip(done, blocks_of(student.model), strict=True):
        block.register_forward_hook(lambda *_, event=event: event.set())

    def before(piece: Piece) -> None:
        # The weights of a block are sent only after the block before it has run.
        number = int(piece.name.split(".")[2])
        assert number == 0 or done[number - 1].wait(LONG)

    student.expect(late.come(student, ORDERS["as-used"](list(late.content)), before))
    assert student.accumulate([(targets[0, 0], 1.0)]) == wanted
    assert_same_bits(take_gradients(student), slopes)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_an_arrival_that_fails_fails_the_computation(setup, name: str) -> None:
    _, plan, targets, _ = setup
    plan = plan_of(setup[0], "exclude=[]")
    student, late = Student(plan, CPU), Late(plan, constant(plan, 0.3))

    def before(piece: Piece) -> None:
        if piece.name == name:
            raise ConnectionError(f"lost {name}")

    student.expect(late.come(student, list(late.content), before))
    with pytest.raises(ConnectionError, match=f"lost {name}"):
        student.accumulate([(targets[0, 0], 1.0)])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_of_blocks_that_are_never_called_are_waited_for(
    setup, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """Some models use a block's weights without calling the block."""
    config, plan, targets, coefficients = setup
    student = filled(plan, coefficients)
    wanted = student.accumulate([(targets[0, 0], 1.0)])
    slopes = take_gradients(student)
    never: list[torch.nn.Module] = []

    def uncalled(model: torch.nn.Module) -> list[torch.nn.Module]:
        never.extend(torch.nn.ModuleList([block]) for block in blocks_of(model)[1:])
        return [blocks_of(model)[0], *never]

    monkeypatch.setattr(engine.learning.student, "blocks_of", uncalled)
    student = Student(plan_of(config, f"gradient_checkpointing={checkpointing}".lower()), CPU)
    assert len(never) == 2
    late, end = Late(plan, coefficients), threading.Event()
    student.model.base_model.norm.register_forward_hook(lambda *_: end.set())

    def before(piece: Piece) -> None:
        # Sent only after a whole pass has run without these weights.
        assert piece.name.startswith("model.layers.0.") or end.wait(LONG)

    student.expect(late.come(student, ORDERS["as-used"](list(late.content)), before))
    assert student.accumulate([(targets[0, 0], 1.0)]) == wanted
    assert_same_bits(take_gradients(student), slopes)


# Copies to and from a GPU.


@pytest.mark.parametrize("buffers", [1, 6])
def test_copies_beside_the_computation_change_no_bit(setup, monkeypatch: pytest.MonkeyPatch, buffers: int) -> None:
    """Weights arrive in buffers and gradients leave in them, both later than the calls that ask for it."""
    _, plan, targets, coefficients = setup
    cut_small(monkeypatch, block=100, piece=300)
    moved = Coefficients(coefficients.layout, coefficients.values[::-1].copy())

    def steps() -> list[tuple[list[Losses], np.ndarray]]:
        student, shards, found = Student(plan, CPU), LocalShards(plan, 2, overlap=True), []
        spoil(student)
        for table in (coefficients, moved, coefficients):
            student.expect(shards.merge(table, student))
            leaving = shards.gradients(table.layout)
            losses = student.accumulate([(targets[0, 0], 0.5), (targets[1, 0], 0.5)], leaving)
            found.append((losses, leaving.collect()))
        return found

    wanted = steps()
    cuda = fake_cuda(monkeypatch, buffers)
    for (losses, gradient), (ours, slope) in zip(wanted, steps(), strict=True):
        assert ours == losses
        np.testing.assert_array_equal(slope, gradient)
    assert 1 <= len(cuda.pinned) <= buffers
    assert sum(len(stream.work) for stream in cuda.copies.values()) > 2 * 300, "a copy and what it waits for"


def test_weights_are_overwritten_after_the_last_pass_alone(setup, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plan, targets, coefficients = setup
    fake_cuda(monkeypatch)
    noted, waited = [], []
    computed, start_copy = engine.learning.student.computed, engine.learning.student.start_copy
    monkeypatch.setattr(engine.learning.student, "computed", lambda device: noted.append(computed(device)) or noted[-1])

    def copying(target: Tensor, source: Tensor, after: object) -> object:
        waited.append(after)
        return start_copy(target, source, after)

    monkeypatch.setattr(engine.learning.student, "start_copy", copying)
    student, shards = Student(plan, CPU), LocalShards(plan, 1, overlap=False)
    for use in (lambda: student.accumulate([(targets[0, 0], 1.0)]), lambda: student.measure([targets[0, 0]])):
        waited.clear()
        last = noted[-1]
        student.expect(shards.merge(coefficients, student))
        use()
        assert waited and set(waited) == {last} and noted[-1] is not last


def test_a_merge_that_fails_gives_its_buffer_back(setup, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plan, targets, coefficients = setup
    fake_cuda(monkeypatch, buffers=1)
    student, shards = Student(plan, CPU), LocalShards(plan, 2, overlap=True)
    streams = shards._task_vectors
    first, merge = in_order_of_use(plan.merged)[0], streams.merge

    def failing(piece: Piece, *rest: Any) -> None:
        if piece.name == first:
            raise OSError("the file is gone")
        merge(piece, *rest)

    monkeypatch.setattr(streams, "merge", failing)
    arrivals = shards.merge(coefficients, student)
    for name, futures in arrivals.items():
        for future in futures:
            if name == first:
                with pytest.raises(OSError, match="gone"):
                    future.result(LONG)
            else:
                future.result(LONG)
    student.expect(arrivals)
    with pytest.raises(OSError, match="gone"):
        student.accumulate([(targets[0, 0], 1.0)])


# Gradients that leave.


class Recorder:
    """A `Gradients` that keeps what it is sent."""

    def __init__(self, student: Student) -> None:
        self.student, self.taken = student, dict[str, Tensor]()
        self.order: list[str] = []

    def send(self, name: str, gradient: Tensor) -> None:
        assert not gradient.requires_grad
        assert parameters(self.student)[name].grad is None, "no gradient stays on the parameter"
        self.order.append(name)
        self.taken[name] = gradient.clone()

    def collect(self) -> np.ndarray:
        raise AssertionError("the student does not collect")


@pytest.mark.parametrize(
    ("family", "tied"),
    [("llama", False), as_thorough(("llama", True)), as_thorough(("gemma3", False)), ("gemma3", True)],
)
@pytest.mark.parametrize("exclude", [None, []], ids=["by-default", "all-merged"])
def test_gradients_that_leave_equal_those_that_would_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, tied: bool, exclude: list[str] | None
) -> None:
    options = {} if exclude is None else {"exclude": exclude}
    plan = plan_of(tiny.make_merge(tmp_path / "merge", family, samples=(1, 2), tied=tied, **options))
    # Several pieces of logits, so that the head's gradient is a sum.
    monkeypatch.setattr(engine.learning.student, "LOGIT_BYTES", 4 * 4 * tiny.VOCAB)
    student, targets = filled(plan), targets_of(plan, tmp_path)
    embedding = [name for name in plan.merged if "embed_tokens" in name or "lm_head" in name]
    assert len(embedding) == (0 if exclude is None else 1 if tied else 2)

    whole = [student.accumulate([(targets[at], 0.75)]) for at in ((0, 0), (1, 1))]
    slopes = take_gradients(student)
    leaving = Recorder(student)
    # The sum over the window leaves in the last sample's backward pass.
    parts = [
        student.accumulate([(targets[0, 0], 0.75)]),
        student.accumulate([(targets[1, 1], 0.75)], leaving),
    ]
    assert parts == whole
    assert sorted(leaving.order) == sorted(plan.merged), "each leaves once"
    assert_same_bits(leaving.taken, {name: slopes[name] for name in leaving.taken})
    assert all(parameter.grad is None for parameter in student.model.parameters())
    last, first = (max(i for i, name in enumerate(leaving.order) if f"layers.{block}." in name) for block in (2, 0))
    assert last < first, "gradients of late blocks leave before those of early blocks are computed"

    # Leaving with every sample, as with `gradients: stream`, the parts add up to the same sums.
    total: dict[str, Tensor] = {}
    for at in ((0, 0), (1, 1)):
        student.accumulate([(targets[at], 0.75)], again := Recorder(student))
        assert sorted(again.order) == sorted(plan.merged)
        total = {name: total.get(name, 0) + tensor for name, tensor in again.taken.items()}
    for name, slope in slopes.items():
        torch.testing.assert_close(total[name], slope, rtol=1e-4, atol=1e-6 * slope.abs().max().item(), msg=name)


def test_gradients_stay_without_a_receiver(setup) -> None:
    _, plan, targets, _ = setup
    student = filled(plan)
    student.accumulate([(targets[0, 0], 1.0)], leaving := Recorder(student))
    student.accumulate([(targets[0, 0], 1.0)])
    assert_same_bits(take_gradients(student), leaving.taken)
    assert len(leaving.order) == len(plan.merged)


# Logits in pieces.


def test_checkpointing_does_not_copy_the_state_of_random_numbers(setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that would wait for it, in every block."""
    config, _, targets, coefficients = setup
    plan = plan_of(config, "gradient_checkpointing=true")
    student = filled(plan, coefficients)
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("nothing in the model is random"))
    student.accumulate([(targets[0, 0], 1.0)])
    assert take_gradients(student)


@pytest.mark.parametrize(("rows", "parts"), [(1, 10), (4, 3), (10, 1), (1000, 1)])
def test_logits_are_computed_in_parts_of_the_given_size(
    setup, monkeypatch: pytest.MonkeyPatch, rows: int, parts: int
) -> None:
    _, plan, targets, coefficients = setup
    student, calls = Student(plan, CPU, logit_bytes=rows * 4 * tiny.VOCAB), []
    student.expect(LocalShards(plan, 1, overlap=False).merge(coefficients, student))
    target = next(target for target in targets.values() if len(target.input_ids_T) == 10)
    rebuild = engine.learning.student.rebuild_logits
    monkeypatch.setattr(
        engine.learning.student, "rebuild_logits", lambda *given: calls.append(given) or rebuild(*given)
    )
    student.measure([target])
    assert len(calls) == 2 * parts, "those of the student and of the expert"


class Shapes(TorchDispatchMode):
    """Records the shapes of the float32 tensors that are created in its context."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, Sequence) else [out]:
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.seen.add(tuple(tensor.shape))
        return out


def most_rows(seen: set[tuple[int, ...]]) -> int:
    """Return the largest number of tokens with logits in one tensor, the head's own weight excluded."""
    logits = {shape for shape in seen if len(shape) > 1 and shape[-1] == tiny.VOCAB}
    return max(shape[-2] for shape in logits if shape[-2] != tiny.COMMON["hidden_size"])


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("exclude", [None, []], ids=["by-default", "all-merged"])
@pytest.mark.parametrize("family", thorough_but(["gemma2"], ["llama", "gemma2"]))
@pytest.mark.parametrize("has_expert", [True, as_thorough(False)], ids=["with-expert", "tokens-only"])
def test_logits_in_pieces_give_the_same_losses_and_gradients(
    made: Made, monkeypatch: pytest.MonkeyPatch, family: str, exclude: list[str] | None, rows: int, has_expert: bool
) -> None:
    options = {} if exclude is None else {"exclude": exclude}
    plan, targets = made(family, experts=1, samples=(2,), parameters={"temperature": 1.5}, **options)
    student, target = filled(plan), targets[0, 1]
    tokens = len(target.input_ids_T)
    assert tokens == 10 and (target.logits_CV is None) == (exclude is None)
    target = target if has_expert else tokens_only(target)
    (wanted,), slopes = student.accumulate([(target, 0.75)]), take_gradients(student)

    taken: list[tuple[int, ...]] = []

    def recorded(student_PV: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        assert not has_expert or student_PV.shape == others[0].shape
        taken.append(tuple(student_PV.shape))
        return (logit_loss if has_expert else entropy_loss)(student_PV, *others)

    monkeypatch.setattr(engine.learning.student, "logit_loss" if has_expert else "entropy_loss", recorded)
    # A byte less than one more row needs; and one byte, with which there is still one row at a time.
    monkeypatch.setattr(engine.learning.student, "LOGIT_BYTES", 1 if rows == 1 else (rows + 1) * 4 * tiny.VOCAB - 1)
    (found,), left = student.accumulate([(target, 0.75)]), take_gradients(student)
    full, rest = divmod(tokens, rows)
    assert taken == [(rows, tiny.VOCAB)] * full + [(rest, tiny.VOCAB)] * bool(rest)
    assert found.hidden == wanted.hidden
    assert found.kl == pytest.approx(wanted.kl, rel=0, abs=DIVERGENCE)
    assert (found.entropy or 0) == pytest.approx(wanted.entropy or 0, rel=1e-5)
    for name, slope in slopes.items():
        torch.testing.assert_close(left[name], slope, rtol=0, atol=GRADIENT * slope.abs().max().item(), msg=name)


@pytest.mark.parametrize("convert", [lambda target: target, tokens_only], ids=["with-expert", "tokens-only"])
def test_the_logits_of_all_tokens_are_never_in_memory_at_once(
    setup, monkeypatch: pytest.MonkeyPatch, convert: Callable[[Target], Target]
) -> None:
    _, plan, targets, _ = setup
    student, target = filled(plan), convert(targets[0, 2])
    tokens = len(target.input_ids_T)
    assert target.logits_CV is None and tokens < tiny.COMMON["hidden_size"]
    seen = []
    for nbytes in (engine.learning.student.LOGIT_BYTES, 2 * 4 * tiny.VOCAB):
        monkeypatch.setattr(engine.learning.student, "LOGIT_BYTES", nbytes)
        with Shapes() as shapes:
            student.accumulate([(target, 1.0)])
        seen.append(shapes.seen)
    assert [most_rows(shapes) for shapes in seen] == [tokens, 2]


# Gradient checkpointing.


@pytest.mark.parametrize("family", thorough_but(["llama", "qwen3_moe"], tiny.FAMILIES))
@pytest.mark.parametrize("exclude", [None, []], ids=["by-default", "all-merged"])
def test_gradient_checkpointing_changes_no_bit(tmp_path: Path, family: str, exclude: list[str] | None) -> None:
    options = {} if exclude is None else {"exclude": exclude}
    config = tiny.make_merge(
        tmp_path / "merge", family, 1, samples=(1,), tied=True, parameters={"hidden_layers": "all"}, **options
    )
    plain, twice = plan_of(config), plan_of(config, "gradient_checkpointing=true")
    target = targets_of(plain, tmp_path)[0, 0]
    calls = dict.fromkeys((False, True), 0)
    found = []
    for plan in (plain, twice):
        student = filled(plan)
        for block in blocks_of(student.model):

            def count(*_: object, which: bool = plan.config.gradient_checkpointing) -> None:
                calls[which] += 1

            block.self_attn.register_forward_hook(count)
        (losses,) = student.accumulate([(target, 0.75)])
        slopes = take_gradients(student)
        forwards = calls[plan.config.gradient_checkpointing]
        _, hidden = student._decode([target])
        found.append((losses, slopes, [*hidden], forwards))
    (losses, slopes, hidden, forwards), again = found
    assert again[0] == losses and losses.hidden > 0 and losses.kl > 0
    assert_same_bits(again[1], slopes)
    assert len(hidden) == len(again[2]) == 4
    assert all(torch.equal(one, other) for one, other in zip(hidden, again[2], strict=True))
    assert (forwards, again[3]) == (3, 6), "each block runs once more in the backward pass"
