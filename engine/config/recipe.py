"""The settings of a weight-space method, and the slices of its output: which layers of which models are merged."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from engine.config.vocabulary import TokenSettings
from engine.fields import Section


class Source(Section):
    """A model of a slice.

    Attributes:
        expert: Its index in `Config.models`; None for the base of the config.
        layers: Its first layer and the one after its last; None for all of its layers.
        settings: Its settings.
    """

    expert: int | None
    layers: tuple[int, int] | None = None
    settings: dict[str, Any] = Field(default_factory=dict)


class Slice(Section):
    """Layers of the output that follow each other, and the models that are merged into them.

    Attributes:
        sources: The models, in the order of the config.
        has_base: There is a base θ₀. If not, the first model only provides files and shapes.
        base: The place of the base among the models; None if it is not listed there.
        settings: Settings of the slice.
        merge_method: The method of the slice; None for that of the config.
        module: The module of the model that the slice belongs to, as in `modules`; empty without that key.
    """

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    has_base: bool = True
    base: int | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    merge_method: str | None = None
    module: str = ""

    @property
    def counts_base(self) -> bool:
        """Whether the base is one of the models: it is listed, or mergekit adds it, as to `models`."""
        return self.has_base and (self.base is not None or all(source.layers is None for source in self.sources))


class WeightSpaceSettings(Section):
    """Settings of a weight-space method: of a model, then of its slice, of the module, and of the top level.

    Attributes:
        slices: The slices of the output. `models` is one slice with all layers of every model.
        modules: Settings of the modules, by the keys of `modules`.
        top: Settings of the top level.
        baseless: The config names no base; the first model provides the files of the output.
        tokens: Rules for the rows of tokens, with `tokenizer_source`.
    """

    slices: Annotated[tuple[Slice, ...], Field(min_length=1)]
    modules: dict[str, dict[str, Any]] = Field(default_factory=dict)
    top: dict[str, Any] = Field(default_factory=dict)
    baseless: bool = False
    tokens: TokenSettings = TokenSettings()

    @property
    def plain(self) -> bool:
        """Whether the config lists its models under `models`."""
        only = self.slices[0]
        return len(self.slices) == 1 and not only.module and all(one.layers is None for one in only.sources)

    def settings_of(self, expert: int) -> list[dict[str, Any]]:
        """Return the settings of an expert in each slice that it is a source of."""
        return [one.settings for part in self.slices for one in part.sources if one.expert == expert]

    def listed(self, expert: int) -> str:
        """Return the settings of an expert as a text, of all slices that it is a source of; empty if it has none."""
        settings = self.settings_of(expert)
        each = (", ".join(f"{key}: {value}" for key, value in own.items()) for own in settings if own)
        return "; ".join(dict.fromkeys(each))
