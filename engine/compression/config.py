"""The config of `python cli.py compress`: a mixture of experts, how it is made smaller, and samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from engine.config.reader import BYTES, apply_override, place_in, validated
from engine.config.resources import Cluster
from engine.config.schema import (
    RECORDS,
    TOKENS,
    Calibration,
    CalibrationFile,
    Config,
    ExpertConfig,
    Files,
    Text,
    as_files,
    last_part,
)
from engine.config.yaml_text import Location, check_texts, parse
from engine.errors import ConfigError
from engine.fields import ByteSize, Int, Section
from engine.methods.compression import Compression
from engine.methods.learned import Parameters
from engine.storage.address import addresses_in, check_no_secret
from engine.untrusted import read_text

EXAMPLE = "keys such as `compress: …`"


class CompressionConfig(Section):
    """The keys, as docs/compress.md describes them.

    Attributes:
        model: The path, URI or hub id of the mixture of experts.
        compress: The method.
        calibration: A file with records, or a list of files.
        samples: Number of records that are used.
        max_length: Tokens of the longest sample; longer ones are cut.
        shuffle: Permute the records of each file before the first ones are taken.
        seed: Seed of `shuffle`.
        max_shard_size: Maximum bytes of an output file, unless a single tensor is larger.
        cluster, cache, cache_size, record: As in the config of a merge.
    """

    model: Text
    compress: Compression
    calibration: Annotated[tuple[CalibrationFile, ...], BeforeValidator(as_files, json_schema_input_type=Files)]
    samples: Annotated[Int, Field(ge=1, le=RECORDS)] = 128
    max_length: Annotated[Int, Field(ge=2, le=TOKENS)] = 2048
    shuffle: bool = False
    seed: Annotated[Int, Field(ge=0, lt=2**63)] = 0
    max_shard_size: Annotated[ByteSize, Field(ge=1)] = 5_000_000_000
    cluster: Cluster = Cluster()
    cache: Text | None = None
    cache_size: Annotated[ByteSize, Field(ge=0)] = 50_000_000_000
    record: dict[str, Any] | None = None

    def as_merge(self) -> Config:
        """Return the config by which the engine runs the model: it is the base, and the expert that has the samples."""
        expert = ExpertConfig(model=self.model, name=last_part(self.model), calibration=self.calibration)
        shared = {key: getattr(self, key) for key in ("seed", "max_shard_size", "cluster", "cache", "cache_size")}
        return Config(
            merge_method="expert_merging",
            base_model=self.model,
            models=(expert,),
            parameters=Parameters(samples_per_model=self.samples),
            calibration=Calibration(max_length=self.max_length, shuffle=self.shuffle, generate_responses=0),
            compress=self.compress,
            **shared,
        )


def read_compression(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the YAML of a compression, apply `--set key.sub=value` overrides, and return it as the engine runs it.

    Raises:
        ConfigError: The file cannot be read or is not valid; see `engine.config.reader.load_config`.
    """
    raw, node = parse(read_text(path, BYTES, ConfigError, "the config"), str(path))
    if not isinstance(raw, dict):
        raise ConfigError("the config is not a mapping of keys to values", str(path), EXAMPLE)
    for override in overrides:
        apply_override(raw, override)

    def where(location: Location) -> str:
        return place_in(path, node, location)

    for location, uri in addresses_in(raw):
        check_no_secret(uri, ConfigError, where(location))
    check_texts(raw, where)
    config = validated(CompressionConfig, raw, path, where)
    if not config.calibration:
        raise ConfigError("calibration lists no file", where(("calibration",)), "at least one file with records")
    return config.as_merge()
