"""docs/python.md, block by block in one process, as a reader runs it in a notebook."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import ray
import tiny
import transformers

PAGE = Path(__file__).resolve().parent.parent / "docs" / "python.md"
EXPERTS = {"math": 1, "code": 2}


def make_inputs(folder: Path) -> None:
    """Write the models and the data that the page names."""
    base = tiny.make_model()
    for name, model in {"base": base, **{name: tiny.make_expert(base, seed) for name, seed in EXPERTS.items()}}.items():
        tiny.save(model, folder / name)
        tiny.save_tokenizer(folder / name)
    for name in (*EXPERTS, "new"):
        tiny.write_calibration(folder / f"{name}.jsonl", 4, seed=len(name))
    asked = [{"question": f"w{i} w{i + 1}", "response": f"w{i + 2}"} for i in range(3)]
    (folder / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in asked))


@pytest.mark.slow
@pytest.mark.usefixtures("warm", "one_thread")
def test_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    ids = list(range(3, 12))
    names = {
        "arguments": transformers.TrainingArguments(
            "training", max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
        ),
        "records": [{"input_ids": ids, "labels": ids}] * 8,
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"docs/python.md, block {number}", "exec"), names)
    assert names["merged"].made and names["merged"].path == str(tmp_path / "merged")
    assert len(names["merged"].importance) == len(names["planned"].plan.merged)
    assert set(names["merged"].coefficients["model"].to_pylist()) == set(EXPERTS)
    assert names["scores"].table["model"].unique().to_pylist() == [str(tmp_path / "merged"), "base"]
    assert names["page"].is_file() and (tmp_path / "sweep.html").is_file()
    assert [run.coefficients for run in names["runs"]] == [None, None]
    assert (tmp_path / "merged-with-math" / "model.safetensors").is_file()
    assert not ray.is_initialized()
