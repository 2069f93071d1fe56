"""Metrics of a model on data, batch by batch: generated answers, losses, and the distance to an expert.

Padding never counts. Model and expert are in memory together, so that no hidden states or logits need to be stored.
Letters in tensor names: B batch, T tokens, N tokens of all records that are scored, P a part of these, H hidden
features, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from engine.calibration.records import Record
from engine.calibration.samples import Encoded
from engine.calibration.text_encoder import TextEncoder
from engine.errors import CheckpointError
from engine.evaluation.items import DataSet, Item
from engine.evaluation.metrics import chosen, exact_match, f1
from engine.evaluation.results import Row
from engine.evaluation.subject import Reader, Subject, ended, stop_tokens
from engine.learning.losses import hidden_loss, logit_loss
from engine.models.forward import arguments, decode, language_model, rebuild_logits, written
from engine.sizes import LOGIT_BYTES


class Evaluation:
    """Evaluates a loaded model.

    `keeps`: the last and middle hidden states of experts are kept, for other weights of the model on the same batches.
    """

    def __init__(self, subject: Subject, device: torch.device, keeps: bool = False) -> None:
        self.subject, self.device, self._batch, self._keeps = subject, device, subject.options.batch_size, keeps
        self._kept: dict[tuple[Subject, tuple[tuple[int, ...], ...]], tuple[Tensor, Tensor]] = {}

    @torch.inference_mode()
    def measure(self, name: str, data: DataSet, expert: Subject | None) -> list[Row]:
        """Return the metrics of the model on the data as rows under `name`; texts are compared with the expert, if any.

        Raises:
            CheckpointError: the model's logits are not finite.
        """
        with Reader(self.subject, data) as reader:
            sums = self.sums(name, data, reader, expert)
        return [Row(name, data.name, *figure) for figure in figures(data, sums, expert is not None)]

    @torch.inference_mode()
    def sums(
        self, name: str, data: DataSet, reader: Reader, expert: Subject | None, generates: bool = True
    ) -> Mapping[str, float]:
        """Return sums of metrics over all records, of which `figures` makes metrics.

        Those of several parts of a data set may be added. Without `generates`, no answers are generated, and the
        metrics of these are zero.

        Raises:
            CheckpointError: the model's logits are not finite.
        """
        sums = defaultdict[str, float](float)
        items = sorted(data.items, key=lambda item: item.length)
        for batch in _slices(items, self._batch):
            if data.kind == "text":
                encoded = [reader.whole(item, item.wholes[0]) for item in batch]
                parts = [self._compared(group, expert) for group in _passes(encoded)]
            else:
                parts = [self._answered(batch, reader, generates)]
            for part in parts:
                for metric, value in part.items():
                    sums[metric] += value
            if not np.isfinite(sums["loss"]):
                raise CheckpointError("the model's logits are not finite", f"{name}, on {batch[0].wholes[0].where}")
        return sums

    def _answered(self, items: Sequence[Item], reader: Reader, generates: bool) -> dict[str, float]:
        """Return sums of metrics over items of kind `response` or `choice`."""
        wholes = [reader.whole(item, record) for item in items for record in item.wholes]
        scores = iter([one for some in _slices(wholes, self._batch) for one in forced(self.subject.model, some)])
        sums = defaultdict[str, float](float)
        answers = self._written([reader.prompt(item) for item in items], reader) if generates else [""] * len(items)
        for item, text in zip(items, answers, strict=True):
            of_item = [next(scores) for _ in item.wholes]
            sums["loss"] += of_item[item.answer].loss
            sums["predicted"] += of_item[item.answer].tokens
            sums["exact_match"] += exact_match(text, item.response)
            sums["f1"] += f1(text, item.response)
            if item.choices:
                means = [one.loss / one.tokens for one in of_item]
                sums["accuracy"] += chosen(text, item.choices) == item.answer
                sums["accuracy_likelihood"] += means.index(min(means)) == item.answer
        return sums

    def _written(self, prompts: Sequence[Encoded], reader: Reader) -> list[str]:
        """Return the text that the model generates for each prompt, up to the first end token."""
        model, answers = self.subject.model, list[list[int]]()
        # Greedy decoding, whatever the checkpoint's generation config contains (penalties, beams, …).
        own, stops = language_model(model).generation_config, reader.stops
        plain = transformers.GenerationConfig(bos_token_id=own.bos_token_id, eos_token_id=stops or None)
        plain.pad_token_id = own.pad_token_id if own.pad_token_id is not None else (stops or [0])[0]
        language_model(model).generation_config = plain
        for some in _passes(prompts):
            width = max(len(one.input_ids) for one in some)
            rows = [[0] * (width - len(one.input_ids)) + list(one.input_ids) for one in some]
            marks = [[0] * (width - len(one.input_ids)) + [1] * len(one.input_ids) for one in some]
            ids_BT, mask_BT = (torch.tensor(one, device=self.device) for one in (rows, marks))
            given = arguments(ids_BT, mask_BT, some[0].inputs)
            for row in written(model, given, self.subject.options.max_new_tokens).tolist():
                end = next((place for place, token in enumerate(row) if token in stops), len(row))
                answers.append(row[:end])
        language_model(model).generation_config = own
        return reader.decode(answers)

    def _compared(self, encoded: Sequence[Encoded], expert: Subject | None) -> dict[str, float]:
        """Return sums over the tokens of texts: the model's loss, and its distances to the expert."""
        model, sums = self.subject.model, defaultdict[str, float](float)
        ids_BT, mask_BT, last_BTH, hidden = _forward(model, encoded)
        at = mask_BT.bool()
        # Targets of the loss: all tokens but the first of each record and those of images. -100 is ignored.
        expected_BT = ids_BT.masked_fill(~at, -100)
        for row_T, one in zip(expected_BT, encoded, strict=True):
            for start, stop in one.images:
                row_T[start:stop] = -100
        following_BT = functional.pad(expected_BT[:, 1:], (0, 1), value=-100)
        following_N, last_NH, middle = following_BT[at], last_BTH[at], (len(hidden) - 1) // 2
        sums["tokens"], sums["predicted"] = len(following_N), int((following_N >= 0).sum())
        other_NH = None
        if expert is not None:
            other_BTH, its_BTH = self._of_expert(expert, encoded, middle)
            other_NH = other_BTH[at]
            # The layers may be on several devices.
            mine_BTH, its_BTH = (states.to(at.device).float() for states in (hidden[middle], its_BTH))
            sums["distance"] = float(hidden_loss({0: mine_BTH[at]}, {0: its_BTH[at]})) * sums["tokens"]
            sums["spread"] = sum(
                float((rows_TH - rows_TH.mean(dim=0)).square().mean(dim=1).sum())
                for rows_TH in (its_TH[mine_T] for its_TH, mine_T in zip(its_BTH, at, strict=True))
            )
        for some in _pieces(model, len(following_N)):
            logits_PV = rebuild_logits(model, last_NH[None, some])[0].float()
            loss = functional.cross_entropy(logits_PV, following_N[some], ignore_index=-100, reduction="sum")
            sums["loss"] += float(loss)
            if expert is not None and other_NH is not None:
                expert_PV = rebuild_logits(expert.model, other_NH[None, some])[0].to(logits_PV.device)
                sums["kl"] += float(logit_loss(logits_PV, expert_PV, 1.0)[0])
                sums["top1_agreement"] += int((logits_PV.argmax(-1) == expert_PV.argmax(-1)).sum())
        return sums

    def _of_expert(self, expert: Subject, encoded: Sequence[Encoded], middle: int) -> tuple[Tensor, Tensor]:
        """Return the last and the middle hidden states [B, T, H] of an expert."""
        key = expert, tuple(tuple(one.input_ids) for one in encoded)
        if key in self._kept:
            return self._kept[key]
        _, _, last_BTH, hidden = _forward(expert.model, encoded)
        # The same text may stand beside another image.
        if self._keeps and not any(one.inputs for one in encoded):
            self._kept[key] = last_BTH, hidden[middle]
        return last_BTH, hidden[middle]


@dataclass(frozen=True)
class Forced:
    """The score of one response: Σ −ln p of its tokens in nats, their number, and whether each is the most likely."""

    loss: float
    tokens: int
    right: bool


@torch.inference_mode()
def forced(model: Any, encoded: Sequence[Encoded]) -> list[Forced]:
    """Return the scores of responses under teacher forcing; see `score`."""
    scores = []
    for some in _passes(encoded):
        ids_BT, _, last_BTH, _ = _forward(model, some)
        starts = [one.response for one in some if one.response]
        assert len(starts) == len(some)
        lengths = [len(one.input_ids) - start for one, start in zip(some, starts, strict=True)]
        places = [(row, start + i) for row, start in enumerate(starts) for i in range(lengths[row])]
        row_N, place_N = torch.tensor(places, device=ids_BT.device).T
        response_N, last_NH = ids_BT[row_N, place_N], last_BTH[row_N, place_N - 1]
        losses, rights = [], []
        for piece in _pieces(model, len(places)):
            logits_PV = rebuild_logits(model, last_NH[None, piece])[0].float()
            losses.append(functional.cross_entropy(logits_PV, response_N[piece], reduction="none"))
            rights.append(logits_PV.argmax(-1) == response_N[piece])
        split = zip(*(torch.split(torch.cat(parts), lengths) for parts in (losses, rights)), strict=True)
        scores += [Forced(float(loss.double().sum()), len(loss), bool(right.all())) for loss, right in split]
    return scores


def score(model: Any, tokenizer: Any, records: Sequence[Record], batch: int) -> tuple[float, float]:
    """Return exact match (0 to 1) and loss (nats per token) of the records' responses, without generating.

    Greedy decoding generates exactly the response if and only if, under teacher forcing, the most likely token is right
    at every position of the response, its end token included. So one forward pass of a batch gives both figures.
    `model` is a transformers model.
    """
    encoder, stops = TextEncoder(tokenizer), stop_tokens(model, tokenizer.eos_token_id)
    encoded = [ended(encoder.encode(record), stops, record.where) for record in records]
    scores = [one for some in _slices(encoded, batch) for one in forced(model, some)]
    loss, tokens = sum(one.loss for one in scores), sum(one.tokens for one in scores)
    return sum(one.right for one in scores) / len(scores), loss / tokens


def figures(data: DataSet, sums: Mapping[str, float], compared: bool) -> Iterator[tuple[str, float, int]]:
    """Yield metric, value and count from sums over all records."""
    records, tokens, predicted = len(data.items), int(sums["tokens"]), int(sums["predicted"])
    names = {"text": (), "response": ("exact_match", "f1"), "choice": ("accuracy", "accuracy_likelihood")}[data.kind]
    for name in names:
        yield name, sums[name] / records, records
    if data.kind == "response":
        yield "loss", sums["loss"] / predicted, predicted
    if data.kind != "choice":
        with np.errstate(over="ignore"):
            yield "perplexity", float(np.exp(sums["loss"] / predicted)), predicted
    if data.kind == "text" and compared:
        yield "kl", sums["kl"] / tokens, tokens
        yield "top1_agreement", sums["top1_agreement"] / tokens, tokens
        yield "hidden_distance", sums["distance"] / tokens, tokens
        yield "hidden_relative", sums["distance"] / max(sums["spread"], 1e-12), tokens


def _forward(model: Any, encoded: Sequence[Encoded]) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Return token ids and mask [B, T], padded on the right, the last hidden state and all hidden states [B, T, H]."""
    width, device = max(len(one.input_ids) for one in encoded), model.device
    ids_BT = torch.tensor([list(one.input_ids) + [0] * (width - len(one.input_ids)) for one in encoded], device=device)
    lengths_B = torch.tensor([len(one.input_ids) for one in encoded], device=device)
    mask_BT = (torch.arange(width, device=device) < lengths_B[:, None]).long()
    last_BTH, hidden = decode(model, arguments(ids_BT, mask_BT, encoded[0].inputs))
    return ids_BT, mask_BT, last_BTH.to(device), hidden


def _passes(encoded: Sequence[Encoded]) -> list[Sequence[Encoded]]:
    """Return the groups of a batch that share a forward pass.

    Records with images run one at a time, because the shapes of pixel inputs differ by model family.
    """
    return [[one] for one in encoded] if any(one.inputs for one in encoded) else [encoded]


def _slices(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _pieces(model: Any, tokens: int) -> list[slice]:
    """Return slices of the tokens, each with at most LOGIT_BYTES of float32 logits."""
    rows = max(1, LOGIT_BYTES // (4 * language_model(model).get_output_embeddings().weight.shape[0]))
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]
