"""Disk space of a merge: what the output and the state in OUT.run/ take, and what the disk of the output has.

The output is written in OUT.run/ and renamed, so one disk holds both, and an earlier merge in OUT until then.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import rich.filesize

from engine.checkpoints.headers import BYTES, SAFETENSORS
from engine.checkpoints.structure import Role
from engine.errors import ClusterError
from engine.methods.registry import NATIVE
from engine.planning.factors import decomposed, factor_elements, stored_bytes
from engine.planning.plan import Plan
from engine.storage.paths import is_uri

# The name of a tensor from the number of its layer on.
LAYER = re.compile(r"(\.\d+)\..*")
# Names of matrices whose inputs are no other matrix's.
LAST = re.compile(r"\.(o_proj|out_proj|dense|down_proj|c_proj|proj|wo|w2|fc2|dense_4h_to_h)\.")


@dataclass(frozen=True)
class DiskNeeds:
    """Bytes of a merge on disk: the output's weights, stored task vectors, (estimated) targets, and leading parts.

    Stored task vectors take the place of the leading parts from which they are computed, matrix by matrix. `blocks` is
    what a merge stores that is solved block by block, `statistics` are those that it collects (estimated).
    """

    output: int
    orthogonal: int = 0
    targets: int = 0
    parts: int = 0
    blocks: int = 0
    statistics: int = 0

    @property
    def total(self) -> int:
        """The most bytes of OUT.run/: before task vectors are stored, or when the output is complete."""
        return self.targets + self.statistics + max(self.parts, self.output + self.orthogonal + self.blocks)

    def __str__(self) -> str:
        parts = {"the output": self.output, "task vectors": self.orthogonal, "targets": self.targets}
        parts |= {"what is solved block by block": self.blocks, "statistics": self.statistics}
        if self.parts > self.output + self.orthogonal:
            parts = {"leading parts of the experts": self.parts, "targets": self.targets, "statistics": self.statistics}
        return ", ".join(f"{rich.filesize.decimal(nbytes)} for {what}" for what, nbytes in parts.items() if nbytes)


@dataclass(frozen=True)
class DiskRoom:
    """Free bytes of the disk of an output, and bytes that an earlier start of the run has stored there."""

    free: int
    held: int

    @classmethod
    def of(cls, out: str) -> DiskRoom | None:
        """Return the room for an output, which need not exist yet; None in object storage, whose limits are unknown."""
        if is_uri(out):
            return None
        path = Path(out)
        disk = next(folder for folder in (path, *path.parents) if os.path.isdir(folder))  # noqa: PTH112 - no error
        held = 0
        for file in path.with_name(f"{path.name}.run").rglob("*"):
            with suppress(FileNotFoundError):  # a merge that is running
                held += file.lstat().st_size
        return cls(shutil.disk_usage(disk).free, held)


def disk_needs(
    plan: Plan, tokens: Sequence[Sequence[int]] = (), factored: Collection[str] = (), stored: bool = False
) -> DiskNeeds:
    """Return the disk space of a merge.

    Args:
        plan: The plan.
        tokens: Numbers of tokens of the samples, given per expert.
        factored: The matrices that are merged through factors.
        stored: The task vectors are stored already, so that no leading parts are needed.
    """
    tensors = plan.base_header.tensors
    each = {name: tensor.numel * BYTES.get(plan.out_dtype(name), 1) for name, tensor in tensors.items()}
    output = sum(each.values())
    method = NATIVE.get(plan.config.merge_method)
    if method is not None and method.outputs == "experts":
        output *= len(plan.experts)
    targets = target_bytes(plan, sum(map(sum, tokens))) if plan.config.learned else 0
    parts = 0 if stored else 4 * factor_elements(plan, decomposed(plan))
    statistics = statistics_bytes(plan, tokens)
    if plan.config.collect:
        return DiskNeeds(0, statistics=statistics)
    if plan.config.compress is not None:
        return DiskNeeds(output, blocks=output)  # at most: all experts are merged, and none is left out
    return DiskNeeds(output, stored_bytes(plan, factored), targets, parts, block_bytes(plan, each), statistics)


def block_bytes(plan: Plan, output: Mapping[str, int]) -> int:
    """Return the most bytes in the state of a merge that is solved block by block, hidden states aside; else 0.

    `output`: the bytes of each tensor of the output.

    These are the merged model, all solved tensors, and each expert's shares in the equations of the largest layer: for
    a matrix [O, I] the elements of its own size and of the moments of its inputs. All but copies of the base's tensors
    are float32.
    """
    if not any(method.by_blocks for method in plan.config.methods):
        return 0
    tensors, shares = plan.base_header.tensors, Counter[str]()
    for name in plan.merged:
        if plan.base_header.roles.get(name) not in (Role.EMBEDDING, Role.HEAD) and len(tensors[name].shape) == 2:
            rows, columns = tensors[name].shape
            shares[LAYER.sub(r"\1", name)] += rows * columns + columns**2
    copied = sum(nbytes for name, nbytes in output.items() if name not in plan.merged_set)
    return copied + 4 * (2 * sum(plan.numels.values()) + len(plan.experts) * max(shares.values(), default=0))


def statistics_bytes(plan: Plan, tokens: Sequence[Sequence[int]] = ()) -> int:
    """Return about the bytes of the statistics that a merge collects.

    Of a block, matrices with equally many inputs are taken to share these, but for the projections that come last, as
    those of attention's output and of the MLP. `tokens`: see `disk_needs`; none: many.
    """
    config, header = plan.config, plan.base_header
    collected = [config.statistics for one in config.models if config.statistics and not one.statistics]
    collected += [config.statistics_of_base] if config.statistics_of_base and not config.base_statistics else []
    most, inputs = max(map(sum, tokens), default=None), set[tuple[str, int]]()
    for name, tensor in header.tensors.items():
        if len(tensor.shape) == 2 and header.roles.get(name) not in (Role.EMBEDDING, Role.HEAD):
            inputs.add((name if LAST.search(name) else name.rpartition(".")[0].rpartition(".")[0], tensor.shape[1]))
    features = [count for _, count in inputs]
    diagonal = 8 * sum(features)
    gram = sum(4 * min(i * (i + 1) // 2, i * (i if most is None else most)) for i in features)
    fisher = 4 * sum(tensor.numel for tensor in header.tensors.values())
    each = {"activations": diagonal, "gram": gram + diagonal, "fisher": fisher, "sensitivity": 2 * fisher}
    return sum(each[kind] for kinds in collected for kind in kinds)


def check_disk(needs: DiskNeeds, out: str) -> None:
    """Check that the disk of the output has room for the rest of a merge.

    Raises:
        ClusterError: It has not.
    """
    room = DiskRoom.of(out)
    if room is not None and (lacking := shortage(needs, room)):
        raise ClusterError(lacking, out, do="free disk space, or give another --out")


def shortage(needs: DiskNeeds, room: DiskRoom) -> str:
    """Return what the disk lacks, with numbers; empty if the merge fits."""
    missing = needs.total - room.held
    if missing <= room.free:
        return ""
    stored = f", of which {rich.filesize.decimal(room.held)} are stored" if room.held else ""
    return (
        f"the merge needs {rich.filesize.decimal(needs.total)} on the disk of the output{stored}, and "
        f"{rich.filesize.decimal(room.free)} are free ({needs})"
    )


def target_bytes(plan: Plan, tokens: float) -> int:
    """Return the bytes of the targets of all samples: per token the hidden states and, with a merged head, the logits.

    `tokens` are those of all samples; 0 without targets.
    """
    header = plan.base_header
    hidden = int(header.text_config.get("hidden_size") or 0)
    # Without a merged head, the last hidden state replaces the logits unless the expert's head differs. That needs
    # a look at the weights, so the smaller of the two counts here.
    last = (header.vocab_size or 0) if any(header.roles.get(name) is Role.HEAD for name in plan.merged) else hidden
    each = (len(plan.hidden_layers) * hidden + last) * BYTES[SAFETENSORS[plan.dtype]]
    return int(each * tokens) if plan.config.has_targets else 0
