"""The record of a mixture of experts that was made smaller: config, groups of experts, and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from engine.compression.model import CompressedModel
from engine.output.card import write_compression_card
from engine.output.merge_record import input_files, write_config
from engine.storage.local_folder import LocalFolder

# Files that are written after the record.
LAST = tuple(f"merge/{name}" for name in ("config.yaml", "files.json", "identity.json", "memory.json"))
GROUPS = pa.schema(
    [
        ("layer", pa.string()),
        ("expert", pa.int32()),
        ("merged_into", pa.int32()),
        ("dominant", pa.bool_()),
        ("share", pa.float64()),
        ("tokens", pa.int64()),
        ("saliency", pa.float64()),
    ]
)


def write_compression_record(
    folder: Path, compressed: CompressedModel, identity: bytes, digests: Mapping[str, str], weights: Sequence[str]
) -> None:
    """Write the model card, merge/experts.parquet and merge/config.yaml.

    Args:
        folder: The output folder.
        compressed: The model, with all layers compressed.
        identity: The identity of the run, encoded.
        digests: SHA-256 of each input file.
        weights: The names of the weight files, which may be in another folder.
    """
    plan, rows = compressed.plan, list[dict[str, object]]()
    for layer in compressed.layout.layers:
        stored = compressed.stored(layer)
        columns = {name: stored[name].tolist() for name in ("label", "dominant", "share", "count", "saliency")}
        rows += [
            {
                "layer": layer,
                "expert": expert,
                "merged_into": label,
                "dominant": columns["dominant"][label] == expert,
                "share": columns["share"][expert],
                "tokens": int(columns["count"][expert]),
                "saliency": columns["saliency"][expert],
            }
            for expert, label in enumerate(columns["label"])
        ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=GROUPS), folder / "merge" / "experts.parquet")
    write_compression_card(folder / "README.md", compressed.smaller, [_about(compressed, rows)], digests)
    inputs = {model: {file: digests[file] for file in files} for model, files in input_files(plan).items()}
    files = sorted({*LocalFolder(folder).names(), *weights, *LAST})
    write_config(folder / "merge" / "config.yaml", plan, identity, inputs, {"files": files})


def _about(compressed: CompressedModel, rows: Sequence[Mapping[str, object]]) -> str:
    before, after, layers = compressed.layout.count, compressed.kept, len(compressed.layout.layers)
    unused = sum(row["tokens"] == 0 for row in rows)
    return (
        f"{after} instead of {before} experts in each of {layers} layers, by `{compressed.settings.method}`: experts "
        f"were grouped by what they\ndo on calibration samples, and each group merged into one.\n"
        f"`merge/experts.parquet` has the group of every expert. "
        f"No token of the samples chose {unused} of the {len(rows):,} experts."
    )
