"""AdaMerging by the trainer as a plain class, against a composed graph in memory, and the entropy that it lowers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import plan_of
from plain import Plain
from reference import Reference, to_module
from thorough import as_thorough, thorough_but
from torch import Tensor
from torch.func import functional_call

from engine.calibration.records import read_records
from engine.calibration.samples import make_samples
from engine.calibration.text_encoder import TextEncoder
from engine.codec import pack_all, unpack_all
from engine.learning.learner import first_stage
from engine.learning.targets import Target, load_target, save_target
from engine.models.loading import load_tokenizer
from engine.planning.open_models import open_base
from engine.planning.plan import Plan
from engine.shards.local_shards import LocalShards
from engine.storage.local_folder import LocalFolder
from engine.task_vectors.coefficients import Coefficients

pytestmark = pytest.mark.usefixtures("one_thread")
# Both sides compute in float32; the optimiser's normalised steps scale up the rounding of a gradient.
TOLERANCE = 1e-5
GRANULARITIES = ["layer", "task"]


class AdaMerging(Plain):
    """A trainer and its samples; no expert runs."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.shards = plan, LocalShards(plan, threads=1, overlap=False)
        self.samples = make_samples(read_records(plan), TextEncoder(load_tokenizer(open_base(plan).folder)), plan)
        self.targets = {
            (k, sample.index): pack_all(Target(torch.tensor(sample.input_ids)).tensors())
            for k, samples in enumerate(self.samples)
            for sample in samples
        }
        self.start(trainers=1)


class LayerWise(Reference):
    """The reference with the mean entropy as its loss and one coefficient per tensor."""

    def loss(self, alpha: dict[str, Tensor], k: int, i: int) -> Tensor:
        output = functional_call(self.model, self.compose(alpha), (), self.samples[k][i][0])
        return self.beta[k] * torch.distributions.Categorical(logits=output.logits[0]).entropy().mean()

    def learn(self) -> dict[str, Tensor]:
        """Return the learned coefficients, [K, 1], by tensor."""
        start = dict.fromkeys(self.names, self.prior[:, None])
        return self.stage(dict.fromkeys(self.names, 1), start, start)


class TaskWise(LayerWise):
    """The same with one coefficient per expert: `stage` sees a single tensor, whose coefficients all tensors use."""

    def __init__(self, config: Path) -> None:
        super().__init__(config)
        self.tensors, self.names = self.names, ["every"]

    def compose(self, alpha: dict[str, Tensor]) -> dict[str, Tensor]:
        merged = {
            name: self.base[name] + torch.einsum("ks,k...->...", alpha["every"], self.tau[name])
            for name in self.tensors
        }
        return to_module(self.base | merged, self.type)

    def learn(self) -> dict[str, Tensor]:
        return dict.fromkeys(self.tensors, super().learn()["every"])


REFERENCES = {"layer": LayerWise, "task": TaskWise}


def make(folder: Path, granularity: str, family: str = "llama", experts: int = 2, **parameters: object) -> Path:
    return tiny.make_merge(
        folder / "merge",
        family,
        experts,
        merge_method="adamerging",
        parameters={"granularity": granularity, **parameters},
    )


def largest_difference(found: Coefficients, wanted: dict[str, Tensor]) -> float:
    columns = found.layout.columns
    assert columns.keys() == wanted.keys()
    return float(max(np.abs(found.values[:, columns[name]] - wanted[name].numpy()).max() for name in columns))


def moved(merge: AdaMerging, found: Coefficients) -> float:
    return float(np.abs(found.values - np.array([[expert.weight] for expert in merge.plan.experts])).mean())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family", thorough_but(["llama"], tiny.FAMILIES))
def test_coefficients_agree_with_a_composed_graph(tmp_path: Path, family: str, granularity: str) -> None:
    # Without regularisation, the method's default, only the entropy moves a coefficient.
    config = make(tmp_path, granularity, family, epochs=2, regularization=0.0)
    merge = AdaMerging(plan_of(config))
    found = merge.learn(first_stage(merge.plan))
    assert largest_difference(found, REFERENCES[granularity](config).learn()) < TOLERANCE
    assert moved(merge, found) > 1000 * TOLERANCE, "learning must move further than the tolerance"
    assert found.values.shape == (2, len(merge.plan.merged))
    assert (found.values == found.values[:, :1]).all() == (granularity == "task")


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    "parameters",
    [
        as_thorough({"regularization": 0.05, "gradient_accumulation": 8}),
        {"regularization": 5.0, "max_grad_norm": 0.05, "weight_decay": 0.1},
        as_thorough({"loss_weight": 3.0, "learning_rate": 0.03}),
    ],
    ids=["little-regularised", "regularised", "loss-weight"],
)
def test_options_mean_what_the_method_says(tmp_path: Path, parameters: dict[str, float], granularity: str) -> None:
    config = make(tmp_path, granularity, experts=3, epochs=2, **parameters)
    # An expert's own loss weight takes precedence over that of the top level.
    config.write_text(config.read_text().replace("weight: 0.2\n", "weight: 0.2\n    loss_weight: 0.5\n"))
    merge = AdaMerging(plan_of(config))
    assert [expert.loss_weight for expert in merge.plan.experts] == [0.5] + 2 * [parameters.get("loss_weight", 1.0)]
    found = merge.learn(first_stage(merge.plan))
    assert largest_difference(found, REFERENCES[granularity](config).learn()) < TOLERANCE


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_head_and_embedding_may_be_merged_some_tokens_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, granularity: str
) -> None:
    monkeypatch.setattr("engine.learning.student.LOGIT_BYTES", 4 * 4 * tiny.VOCAB)
    config = tiny.make_merge(
        tmp_path / "merge", merge_method="adamerging", exclude=[], parameters={"granularity": granularity}
    )
    merge = AdaMerging(plan_of(config))
    found = merge.learn(first_stage(merge.plan))
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= merge.plan.merged_set
    assert largest_difference(found, REFERENCES[granularity](config).learn()) < TOLERANCE


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_entropy_of_the_merged_model_goes_down(tmp_path: Path, granularity: str) -> None:
    # Each of the six windows holds every sample once, so their means can be compared.
    parameters = {"granularity": granularity, "epochs": 6, "gradient_accumulation": 6, "regularization": 0.0}
    config = tiny.make_merge(tmp_path / "merge", samples=(3, 3), merge_method="adamerging", parameters=parameters)
    merge, reference = AdaMerging(plan_of(config)), LayerWise(config)
    found = merge.learn(first_stage(merge.plan))
    seen = [np.mean([row["entropy"] for row in merge.rows if row["step"] == step]) for step in range(6)]
    assert (np.diff(seen) < 0).all()
    # The learned coefficients, in a model that is built without the engine.
    columns = found.layout.columns
    alpha = {name: torch.tensor(found.values[:, columns[name]], dtype=torch.float32) for name in columns}
    counts = [len(samples) for samples in reference.samples]
    after = [reference.loss(alpha, k, i).item() for k, count in enumerate(counts) for i in range(count)]
    assert np.mean(after) < seen[-1]


def test_the_rows_of_a_step_hold_the_entropy_and_no_alignment_losses(tmp_path: Path) -> None:
    config = make(tmp_path, "layer")
    merge, reference = AdaMerging(plan_of(config)), LayerWise(config)
    merge.learn(first_stage(merge.plan))
    assert all(row["kl"] == 0 and row["hidden"] == 0 for row in merge.rows)
    alpha = dict.fromkeys(reference.names, reference.prior[:, None])
    names = [expert.name for expert in merge.plan.experts]
    first = [row for row in merge.rows if row["step"] == 0]
    wanted = [reference.loss(alpha, names.index(row["model"]), row["sample"]).item() for row in first]
    assert [row["entropy"] for row in first] == pytest.approx(wanted, rel=1e-4)


def test_a_method_that_aligns_has_no_entropy_in_its_rows(tmp_path: Path) -> None:
    merge = Plain(plan_of(tiny.make_merge(tmp_path / "merge", merge_method="expert_merging")), tmp_path)
    merge.learn(first_stage(merge.plan))
    assert {row["entropy"] for row in merge.rows} == {None}


def test_a_target_of_tokens_alone_survives_packing_and_storing(tmp_path: Path) -> None:
    target = Target(torch.tensor([5, 3, 9]))
    assert target.tensors().keys() == {"input_ids"}
    save_target(target, LocalFolder(tmp_path), "target")
    for found in (
        Target.from_tensors(unpack_all(pack_all(target.tensors()))),
        load_target(LocalFolder(tmp_path), "target"),
    ):
        assert torch.equal(found.input_ids_T, target.input_ids_T) and found.input_ids_T.dtype == torch.int64
        assert (found.hidden_CH, found.last_hidden_CH, found.logits_CV) == ({}, None, None)
        assert not found.has_expert
