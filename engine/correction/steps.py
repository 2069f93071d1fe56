"""The steps after a merge that change one matrix at a time, on the shards: `svc` and `aim`.

They change τ = θ − θ₀ of the merged weight θ of a linear layer in float32, before it is rounded once to the dtype of
the output, whatever method merged it. Tensors that are not matrices, embedding and head, and excluded tensors stay as
they are. Rows are a layer's outputs; a matrix that a model stores the other way round (GPT-2) is taken as it is stored.

svc. Source: Li et al., arXiv 2602.05536; see `engine.methods.arithmetic.spectral`. The authors' code
(github.com/lyymuwu/SVC) leaves embeddings out, as here; that of FusionBench does not.
aim. Source: Nobari et al., arXiv 2502.02421; see `engine.methods.arithmetic.damping`. The formula is that of an
implementation by others, not compared with the authors' code. It damps the weights of norms and of the head, too; here
those of linear layers of whose inputs the base has statistics are damped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from threading import Semaphore

import torch
from torch import Tensor

from engine.methods.arithmetic.damping import damp
from engine.methods.arithmetic.spectral import spectral_calibration
from engine.methods.arithmetic.tensor import check_finite
from engine.methods.corrections import CORRECTIONS, Correction
from engine.methods.options import Value
from engine.methods.registry import get_method
from engine.planning.costs.flops import fitting
from engine.planning.plan import Plan
from engine.shards.statistics import MergeStatistics
from engine.task_vectors.pieces import Piece, pieces
from engine.task_vectors.pipeline import Fill, TensorJob, check_merged, copy_of, in_order
from engine.task_vectors.streams import TaskVectors
from engine.task_vectors.sums import whole

Steps = tuple[Correction, ...]


def steps_around(plan: Plan) -> tuple[Steps, Steps]:
    """Return the steps before the layers are solved block by block, and those after; the first are all if none are."""
    steps = plan.config.calibrate
    if get_method(plan.config.merge_method).by_blocks:
        return (), steps
    at = next((at for at, one in enumerate(steps) if CORRECTIONS[one.method].by_blocks), len(steps))
    return steps[:at], steps[at + 1 :]


@dataclass(frozen=True)
class TensorSteps:
    """Steps on the tensors of a merge, in order.

    Attributes:
        plan: The plan.
        steps: The steps.
        models: The base and the experts.
        statistics: Their statistics.
    """

    plan: Plan
    steps: Steps
    models: TaskVectors
    statistics: MergeStatistics

    def after(self, job: TensorJob) -> TensorJob:
        """Return the job of a tensor with the steps after it. It then holds a few whole matrices."""
        name, rounding, at_work = job.name, job.rounding, self._at_work
        if not self.steps or rounding is None or name not in self.plan.matrix_set:
            return job

        def prepare() -> Fill:
            with at_work:
                return copy_of(self._changed(name, rounding.base, self._whole(job)))

        return replace(job, prepare=prepare)

    @cached_property
    def _at_work(self) -> Semaphore:
        """Bounds the memory: the number of matrices that are changed at a time."""
        largest = max((self.plan.numels[name] for name in self.plan.matrices), default=0)
        return Semaphore(fitting(largest))

    def _whole(self, job: TensorJob) -> Tensor:
        """Return the merged tensor, float32.

        Raises:
            RunError: it has a NaN or infinite element.
        """
        fill, theta = job.prepare(), torch.empty(job.shape)
        todo = (partial(_fill, fill, piece, theta.view(-1)) for piece in pieces(job.name, job.shape))
        for _ in in_order(todo, self.models.pool, 2 * self.models.threads):
            pass
        check_merged(job.name, theta)
        return theta

    def _changed(self, name: str, base: Tensor, theta: Tensor) -> Tensor:
        """Return a merged matrix θ [O, I], float32, after all steps."""
        before = tau = theta - base
        for step in self.steps:
            tau = (
                self._svc(name, base, tau, step.options) if step.method == "svc" else self._aim(name, tau, step.options)
            )
        return theta if tau is before else base + tau

    def _svc(self, name: str, base: Tensor, tau: Tensor, options: Mapping[str, Value]) -> Tensor:
        return spectral_calibration(tau, self._task_vectors(name, base), float(options["alpha"]))

    def _aim(self, name: str, tau: Tensor, options: Mapping[str, Value]) -> Tensor:
        statistics = self.statistics.of_base(name)
        moments = None if statistics is None else statistics.moments()
        return tau if moments is None else damp(tau, moments.absolute_I, float(options["omega"]))

    def _task_vectors(self, name: str, base: Tensor) -> Iterator[Tensor]:
        """Yield τₖ of each expert, float32.

        Raises:
            CheckpointError: it has a NaN or infinite element.
        """
        for model, expert in self.models.experts:
            task_vector = expert.task_vector(name)
            tau = torch.zeros(base.shape) if task_vector is None else whole(task_vector, base)
            check_finite(name, model, tau)
            yield tau


def _fill(fill: Fill, piece: Piece, theta_N: Tensor) -> None:
    fill(piece, theta_N[piece.start : piece.stop])
