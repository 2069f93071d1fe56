"""The skills of the quality benchmark: the same in every process, and without a question in two splits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

QUALITY = Path(__file__).resolve().parent.parent / "benchmarks" / "quality"
PRINT = """
import itertools, json, tasks
for skill in tasks.SKILLS:
    training = list(itertools.islice(tasks.training_stream(skill), 1000))
    print(json.dumps([skill, tasks.splits(skill) | {"training": training}]))
"""


def test_no_question_is_in_two_splits_and_processes_agree() -> None:
    one, other = (
        subprocess.run([sys.executable, "-c", PRINT], cwd=QUALITY, check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    )
    assert one == other
    for line in one.splitlines():
        skill, splits = json.loads(line)
        questions = [question for examples in splits.values() for question, _ in examples]
        assert len(set(questions)) == len(questions) == 1360, skill
