"""The bytes of base and experts that a merge reads, for the scaling model."""

from __future__ import annotations

from collections.abc import Collection

from engine.checkpoints.adapters import AdapterHeader
from engine.checkpoints.headers import BYTES, ModelHeader
from engine.planning.plan import ExpertPlan, Plan


def streamed(plan: Plan, names: Collection[str]) -> float:
    """Return the bytes that a pass over these tensors streams. An adapter counts by the time of its product."""
    base = sum(plan.base_header.tensors[name].nbytes for name in names)
    return 2 * base + sum(_expert_bytes(plan, expert, names) for expert in plan.experts)


def _expert_bytes(plan: Plan, expert: ExpertPlan, dense: Collection[str]) -> float:
    if isinstance(expert.header, ModelHeader):
        tensors, sources = expert.header.tensors, {name: expert.match.names(name) for name in dense}
        return sum(plan.numels[name] * BYTES[tensors[names[0]].dtype] for name, names in sources.items() if names)
    # The product of two factors of rank r takes 2r FLOP per element: as long on a core as streaming about 2r/4 bytes.
    own = {name: expert.header.tensors[pair.a].shape[0] for name, pair in expert.header.pairs.items()}
    products = sum(plan.numels[name] * 2 * rank / 4 for name, rank in own.items() if name in dense)
    whole = [expert.header.tensors[own].nbytes for name, own in expert.header.whole.items() if name in dense]
    return products + sum(whole)


def read_bytes(plan: Plan) -> float:
    """Return the bytes of all weights of base and experts in their files."""
    total = 0.0
    for model in (plan.base, *plan.experts):
        header: ModelHeader | AdapterHeader = model.header
        total += sum(tensor.nbytes for tensor in header.tensors.values())
    return total
