"""The sections of the report of one merge: tables and charts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.filesize import decimal

from engine.config.mergekit_yaml import as_yaml
from engine.config.slices import described
from engine.report import charts
from engine.report.charts import Axis, Blocks, Scale
from engine.report.merge_folder import Importance, Merged
from engine.report.parts import LOSS_NAMES, Cell, Chart, PerCent, ReportSection, Table, duration, moment, share
from engine.report.resources import memory_and_traffic, times
from engine.statistics.fits import total_residual
from engine.task_vectors.coefficients import Array, Coefficients

# Each expert has a chart of its own with at most FACETS experts and more than TENSORS merged tensors.
FACETS, TENSORS = 12, 40
# Tensors in the chart of the most important ones, and in the table of those of which most is left.
TOP = 20
# Chunk values per line, and at most, in the text of a heatmap's cell.
CHUNK_LINE, CHUNKS = 8, 64


def sections_of(merge: Merged) -> list[ReportSection]:
    """Return all sections of a merge after its summary, except its options."""
    sections = [ReportSection("Key figures", tables=[Table(list(key_figures(merge)))]), _experts(merge)]
    if merge.fits:
        sections.append(_fits(merge))
    sections += _coefficients(merge)
    if merge.importance is not None:
        sections.append(_importance(merge.importance))
    if merge.losses():
        sections.append(_losses(merge))
    if merge.memory is not None:
        sections += [times(merge.memory), memory_and_traffic(merge.memory)]
    return sections


def key_figures(merge: Merged) -> Iterator[tuple[str, str]]:
    """Yield the key figures of a merge as pairs of name and value."""
    config, memory = merge.config, merge.memory
    yield "method", config.merge_method
    if config.calibrate:
        yield "then", ", ".join(map(str, config.calibrate))
    yield "base", config.base_model
    yield "experts", f"{len(config.models):,}"
    if config.recipe is not None and not config.recipe.plain:
        yield "slices", "; ".join(described(config.recipe, [expert.name for expert in config.models]))
    if merge.stages:
        layout = next(iter(merge.stages.values())).layout
        elements = sum(edges[-1] for edges in layout.edges)
        yield "merged", f"{len(layout.tensors):,} tensors of {elements:,} elements"
        learned = (f"{table.layout.learned_columns.sum():,} in stage {stage}" for stage, table in merge.stages.items())
        yield "coefficients per expert", ", ".join(learned)
    if losses := merge.losses():
        steps = ((stage, len(merge.mean_curve(stage, of[0]).steps)) for stage, of in losses.items() if of)
        yield "optimiser steps", ", ".join(f"{count:,} in stage {stage}" for stage, count in steps)
    if merge.fits:
        yield "residual of sums of task vectors", share(total_residual(merge.fits))
    if merge.survived is not None and merge.survived.survived is not None:
        yield "change left by rounding", f"{share(merge.survived.survived)}, {merge.survived.rounding}"
    if memory is not None:
        yield "largest process", decimal(max(actor.peak_anonymous_bytes for actor in memory.actors))
        used = [(gpu.peak_allocated_bytes, actor.role, gpu.name) for actor in memory.actors for gpu in actor.gpus]
        if used:
            peak, role, name = max(used)
            yield "fullest GPU", f"{decimal(peak)}, {role} on {name}"
        if memory.reused:
            yield "from earlier merges", ", ".join(f"{count:,} {what}" for what, count in memory.reused.items())
        if memory.at_work is not None:
            starts = f", in {len(memory.starts)} starts" if len(memory.starts) > 1 else ""
            yield "time", f"{duration(memory.at_work)}{starts}"
    if merge.record.date:
        yield "written", moment(merge.record.date)
    yield "made with", ", ".join(f"{name} {number}" for name, number in merge.record.versions.items())


def _experts(merge: Merged) -> ReportSection:
    """Return the table of experts: priors and learned coefficients, or the options of a weight-space method."""
    rows: list[list[Cell]] = []
    for k, expert in enumerate(merge.config.models):
        row: list[Cell] = [expert.name]
        for table in list(merge.stages.values())[-1:]:
            values = table.values[k, table.layout.learned_columns]
            row += [merge.prior(expert.name), *map(float, (values.mean(), values.min(), values.max()))]
        if merge.config.recipe is not None:
            row.append(merge.config.recipe.listed(k) or "as for the whole merge")
        rows.append([*row, expert.model])
    head = ["expert", *(["prior", "mean coefficient", "smallest", "largest"] if merge.stages else [])]
    head += [*([] if merge.config.learned else ["options"]), "model"]
    return ReportSection("Experts", tables=[Table(rows, head, explain=True)])


def _fits(merge: Merged) -> ReportSection:
    """Return the section of the coefficients in closed form, with the layers of which most is left."""
    fits, left = merge.fits, total_residual(merge.fits)
    energy = sum(fit.energy for fit in fits.values())
    by_layer = {name: fit.energy * fit.residual for name, fit in fits.items()}
    top = sorted(fits, key=lambda name: -by_layer[name])[:TOP]
    labels = dict(zip(fits, Blocks.of(list(fits)).names(list(fits)), strict=True))
    experts = [expert.name for expert in merge.config.models]
    experts = experts if len(experts) <= FACETS else []

    def part(value: float, whole: float) -> PerCent:
        return PerCent(value / whole if whole else 0.0)

    rows: list[list[Cell]] = [
        [
            labels[name],
            part(fits[name].energy, energy),
            PerCent(fits[name].residual),
            part(by_layer[name], energy * left),
            *fits[name].coefficients[: len(experts)],
        ]
        for name in top
    ]
    orthogonal = merge.config.learned and merge.config.parameters.task_vectors == "orthogonal"
    vectors = "orthogonal task vectors" if orthogonal else "task vectors"
    text = (
        f"Of each layer, these are the coefficients whose sum of {vectors} has outputs nearest to the experts', on the "
        f"inputs that each expert saw, by least squares. The residual of all {len(fits):,} layers is {share(left)}. "
        "Chunks with coefficients of their own may leave less."
    )
    head = ["layer", "share of the change", "residual", "share of all that is left", *experts]
    title = f"The {len(top)} layers of which most is left" + (
        ", with the coefficients of the experts" if experts else ""
    )
    return ReportSection("How near sums of task vectors come", text, tables=[Table(rows, head, title)])


def options_of(merge: Merged) -> ReportSection:
    """Return the section of all options, collapsed."""
    keys = {key: value for key, value in as_yaml(merge.config).items() if key != "models"}
    rows = sorted((key, str(value)) for key, value in flat(keys).items())
    return ReportSection("Options", folded=Table(rows, title="All options, including defaults"))


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys."""
    if not isinstance(value, Mapping):
        return {key: value}
    parts = (flat(inner, f"{key}.{name}" if key else str(name)) for name, inner in value.items())
    return {name: inner for part in parts for name, inner in part.items()}


def _coefficients(merge: Merged) -> list[ReportSection]:
    """Return one section per stage: the distance of the coefficients from their priors."""
    if not merge.stages:
        return []
    names = [expert.name for expert in merge.config.models]
    priors = np.array([merge.prior(name) for name in names])
    text = (
        "The colour is the distance of a coefficient from its expert's prior: red above, blue below, none at the "
        "prior. If a tensor has several chunks, the colour is their mean; point at a cell to see all values. Tensors "
        "without a chunk have a fixed coefficient."
    )
    multiplied = {"orthogonal": "orthogonal task vectors", "swudi": "the shares of the experts in SWUDI"}
    if (kind := merge.config.parameters.task_vectors) in multiplied:
        text += f" The coefficients of matrices multiply {multiplied[kind]}, which are scaled by 4."
    along = " The chunks of matrices are groups of singular directions of each expert's task vector, the largest first."
    return [
        ReportSection(
            f"Coefficients of stage {stage}",
            text + (along if table.layout.spectral else ""),
            charts=coefficient_charts(table, names, priors),
        )
        for stage, table in merge.stages.items()
    ]


def coefficient_charts(table: Coefficients, names: Sequence[str], priors: Array) -> list[Chart]:
    """Return the heatmaps of one stage: one per expert by block and kind, or one of all experts (see FACETS)."""
    away = table.per_tensor() - priors[:, None]
    limit = float(np.abs(away).max()) or 1.0
    scale = Scale("α − prior", limit, -limit, "+.2~f")
    texts = [_coefficient_texts(table, k) for k in range(len(names))]
    blocks = Blocks.of(table.layout.tensors)
    if len(names) > FACETS or len(table.layout.tensors) <= TENSORS or not blocks.blocks:
        figure = _by_expert(table.layout.tensors, away, texts, names, blocks, scale)
        return [Chart("Experts and tensors", figure, wide=True)]
    across, down = Axis("block", list(map(str, blocks.blocks))), Axis("kind", charts.labels(blocks.kinds))
    facets = [
        Chart(
            f"{name}, prior {prior:g}",
            charts.heatmap(blocks.spread(away[k]), blocks.spread_texts(texts[k]), across, down, scale),
        )
        for k, (name, prior) in enumerate(zip(names, priors, strict=True))
    ]
    if blocks.outside:
        tensors = [table.layout.tensors[place] for place in blocks.outside]
        outside = [[row[place] for place in blocks.outside] for row in texts]
        figure = _by_expert(tensors, away[:, blocks.outside], outside, names, Blocks.of(tensors), scale)
        facets.append(Chart("Tensors outside the blocks", figure, wide=True))
    return facets


def _by_expert(
    tensors: Sequence[str],
    values_KL: Array,
    texts: Sequence[Sequence[str]],
    names: Sequence[str],
    blocks: Blocks,
    scale: Scale,
) -> Any:
    """Return a heatmap of experts × tensors, ordered by block and kind; tensors outside the blocks come last."""
    places, names_L = blocks.in_order(), charts.labels(blocks.names(tensors))
    across = [names_L[place] for place in places]
    columns = zip(blocks.blocks, blocks.cells.T, strict=True)
    begins = {names_L[next(place for place in column if place >= 0)]: str(block) for block, column in columns}
    ticks = begins if len(places) > 60 else {}
    ordered = [[row[place] for place in places] for row in texts]
    axis = Axis("block" if ticks else "tensor", across, ticks)
    return charts.heatmap(values_KL[:, places], ordered, axis, Axis("expert", charts.labels(names)), scale)


def _coefficient_texts(table: Coefficients, k: int) -> list[str]:
    """Return the text of each tensor's cell: the coefficients of expert k."""
    texts = []
    for tensor, learned in zip(table.layout.tensors, table.layout.learned, strict=True):
        values = table.values[k, table.layout.columns[tensor]]
        shown = [f"{value:.4f}" for value in values[:CHUNKS]]
        if len(values) == 1:
            texts.append(f"α = {shown[0]}{'' if learned else ', fixed'}")
            continue
        rows = ["  ".join(shown[at : at + CHUNK_LINE]) for at in range(0, len(shown), CHUNK_LINE)]
        more = [f"and {len(values) - CHUNKS} more"] if len(values) > CHUNKS else []
        chunks = "groups of directions" if tensor in table.layout.spectral else "chunks"
        texts.append("<br>".join([f"mean α = {values.mean():.4f} of {len(values)} {chunks}:", *rows, *more]))
    return texts


def _importance(table: Importance) -> ReportSection:
    """Return the section of importance and chunks of each tensor."""
    blocks = Blocks.of(table.tensors)
    shares, chunks = table.importance, np.array(table.chunks, dtype=np.float64)
    facts = zip(shares, table.numel, table.chunks, strict=True)
    texts = [f"{share(part)} of the importance<br>{n:,} elements, chunks: {m}" for part, n, m in facts]
    drawn = []
    if blocks.blocks:
        across, down = Axis("block", list(map(str, blocks.blocks))), Axis("kind", charts.labels(blocks.kinds))
        for title, values, form in (("Importance", shares, ".1%"), ("Chunks", chunks, "d")):
            scale = Scale(title.lower(), float(values.max()) or 1.0, format=form)
            figure = charts.heatmap(blocks.spread(values), blocks.spread_texts(texts), across, down, scale)
            drawn.append(Chart(f"{title} by block and kind", figure))
    top = np.argsort(-shares, kind="stable")[:TOP]
    names = [blocks.names(table.tensors)[place] for place in top]
    labels = [f"{share(shares[place])}, chunks: {table.chunks[place]}" for place in top]
    figure = charts.bars({"importance": 100 * shares[top]}, names, "% of the importance", labels, flat=True)
    drawn.append(Chart(f"The {len(names)} most important tensors", figure, wide=True))
    fixed = sum(not number for number in table.chunks)
    text = (
        "The importance of a tensor is how much the merge relies on it, by the coefficients of stage 1 and the size of "
        f"the task vectors. It decides the chunks of stage 2: {sum(table.chunks):,} chunks over "
        f"{len(table.tensors):,} tensors, of which {fixed:,} have a fixed coefficient."
    )
    return ReportSection("Importance and chunks", text, charts=drawn)


def _losses(merge: Merged) -> ReportSection:
    drawn = []
    for stage, losses in merge.losses().items():
        for loss in losses:
            curves = {name: (curve.steps, curve.values) for name, curve in merge.curves(stage, loss).items()}
            drawn.append(Chart(f"Stage {stage}: {LOSS_NAMES[loss]}", charts.lines(curves, LOSS_NAMES[loss]), logs=True))
    text = "One line per expert: the mean over its samples in an optimiser step. A step sees only some of the samples."
    if len(merge.config.models) > charts.LEGEND:
        text += f" The {charts.NAMED} that are highest at the end have colours; point at a line for its name."
    return ReportSection("Losses", text, charts=drawn)
