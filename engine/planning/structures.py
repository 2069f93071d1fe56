"""The structure of the models of a plan: which parameter of the base's model each tensor of a file is.

Names of common families tell it alone. The model is built, on the meta device, where they do not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

from engine.checkpoints.adapter_copies import is_copy
from engine.checkpoints.headers import ModelHeader
from engine.checkpoints.structure import Place, Role, Structure, by_names
from engine.errors import CheckpointError


class Structures:
    """Finds the structures of a base and of checkpoints to be compared with it.

    Args:
        base: The base's header.
        required: Whether a model that transformers cannot build is an error. Weight-space methods also merge models
            that transformers does not know; then names decide.
    """

    def __init__(self, base: ModelHeader, required: bool) -> None:
        self._base, self._required = base, required

    @cached_property
    def base(self) -> Structure:
        """The base's structure."""
        structure, certain = by_names(self._base.tensors)
        return structure if certain or self._model is None else self._in_model(self._base)

    def pair(self, expert: ModelHeader) -> tuple[Structure, Structure]:
        """Return the structures of the base and of an expert, to be compared.

        Raises:
            CheckpointError: transformers cannot build a model that is needed to compare the two.
        """
        if self.language(expert):
            return self._in_model(self._base), self._text(expert)
        base, certain = by_names(self._base.tensors)
        other, also_certain = by_names(expert.tensors)
        if self._model_free(base, other) and certain and also_certain:
            return base, other
        if self._model is None:
            return base, other
        return self._in_model(self._base), self._in_model(expert)

    def tensor(self, name: str) -> str | None:
        """Return the base's tensor that is the whole parameter of this name, in any spelling that transformers reads.

        None if there is no such tensor, or if transformers does not know the model.
        """
        parameter = self._find(name) if self._model is not None else None
        return self._by_parameter.get(parameter) if parameter else None

    def ties(self, tensor: str) -> bool:
        """Return whether the base's model takes a tensor of its files from another parameter, which shares its memory.

        Not if transformers does not know the model.
        """
        if self._model is None:
            return False
        from engine.models.names import tied_weights

        return self._in_model(self._base).places[tensor].parameter in tied_weights(self._model)

    @cached_property
    def _find(self) -> Callable[[str], str | None]:
        from engine.models.names import parameter_finder

        return parameter_finder(self._model)

    @cached_property
    def _by_parameter(self) -> dict[str, str]:
        """The base's tensors by parameter, without the parameters of which several tensors are parts."""
        places = self._in_model(self._base).places
        counts = Counter(place.parameter for place in places.values())
        return {place.parameter: name for name, place in places.items() if counts[place.parameter] == 1}

    @staticmethod
    def _model_free(base: Structure, expert: Structure) -> bool:
        """Return whether two structures by names have the same parameters, but for a head."""

        def parameters(structure: Structure) -> set[str]:
            kept = structure.places.keys() - structure.unused
            return {structure.places[name].parameter for name in kept if structure.roles.get(name) is not Role.HEAD}

        return parameters(base) == parameters(expert)

    def language(self, expert: ModelHeader) -> frozenset[str]:
        """Return the parameters of the base's language model if the base takes images and the expert is a text model.

        Else there are none.
        """
        if expert.takes_images or not self._base.takes_images or self._model is None:
            return frozenset()
        return frozenset(self._inside(_build(expert, required=True)).values())

    def _inside(self, text: Any) -> dict[str, str]:
        from engine.models.names import text_parameters

        return text_parameters(text, self._model) if text is not None else {}

    @cached_property
    def _model(self) -> Any:
        """The base on the meta device; None if transformers does not know it."""
        return _build(self._base, self._required)

    def _in_model(self, header: ModelHeader) -> Structure:
        from engine.models.names import structure_of

        return structure_of(self._model, header.tensors, header.folder)

    def _text(self, expert: ModelHeader) -> Structure:
        """Return the structure of a text model in the base's model, by way of the text model's own."""
        from engine.models.names import structure_of

        model = _build(expert, required=True)
        structure = structure_of(model, expert.tensors, expert.folder)
        inside = self._inside(model)
        places = {
            name: Place(inside.get(place.parameter, place.parameter), place.start)
            for name, place in structure.places.items()
        }
        return Structure(places, structure.roles, structure.unused, structure.wrapped, structure.unknown)


def without_tied_head(base: ModelHeader) -> ModelHeader:
    """Return the base's header without a head in its files that is a copy of the embedding to which the model ties it.

    As two tensors, the two would differ after random masks, or after options that apply to one of them.
    """
    names = {role: name for name, role in base.roles.items() if role in (Role.HEAD, Role.EMBEDDING)}
    if len(names) < 2:
        return base
    head, embedding = (base.tensors[names[role]] for role in (Role.HEAD, Role.EMBEDDING))
    if not is_copy(base.folder, head, base.folder, embedding) or not Structures(base, required=False).ties(head.name):
        return base
    tensors = {name: tensor for name, tensor in base.tensors.items() if name != head.name}
    note = f"{head.name} is left out: a copy of {embedding.name}, to which the model ties it"
    return replace(base, tensors=tensors, roles=by_names(tensors)[0].roles, notes=(*base.notes, note))


def _build(header: ModelHeader, required: bool) -> Any:
    """Return a model on the meta device; None if transformers does not know its type, or cannot build it."""
    from engine.models.loading import is_known, load_model_config
    from engine.models.skeleton import build_module

    if not is_known(header.config):
        return None
    try:
        return build_module(load_model_config(header.folder), header.folder)
    except CheckpointError:
        if required:
            raise
        return None


def check_names(base: ModelHeader, structure: Structure) -> None:
    """Check that transformers can read the base's names, since the output has them too.

    Raises:
        CheckpointError: They have the prefix of a wrapper.
    """
    if structure.wrapped:
        raise CheckpointError(
            f"the base's tensors have the prefix of a wrapper (first: {min(structure.wrapped)!r})",
            str(base.folder),
            "names that `from_pretrained` reads",
            "save the model that the wrapper holds with `save_pretrained`",
        )
