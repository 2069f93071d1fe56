"""The model card: names cannot add markup, and no path of this machine occurs in it or in a report."""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from conftest import plan_of
from hypothesis import given
from hypothesis import strategies as st
from recorded_merges import learned, write_merge

from engine.methods.registry import get_method
from engine.output import sources
from engine.output.card import write_card, write_weight_space_card
from engine.output.names import code, markdown, public_config, public_name, yaml_block
from engine.planning.summary import print_weight_space_plan
from engine.report.merge_folder import Merged
from engine.report.page import report_html
from engine.report.sections import key_figures, sections_of

DIGESTS: Mapping[str, str] = defaultdict(lambda: "0" * 64)
HASH = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("model", "public"),
    [
        ("owner/math", "owner/math"),
        (f"owner/math@{HASH}", f"owner/math@{HASH}"),
        ("gpt2", "gpt2"),
        ("/home/alice/experts/math", "math"),
        ("/home/alice/experts/math/", "math"),
        ("../alice/math", "math"),
        ("~/math", "math"),
        ("/", "model"),
        ("s3://user@bucket/deep/math?endpoint_override=host:9000", "math"),
        ("file:///home/alice/math", "math"),
        (f"/home/alice/.cache/huggingface/hub/models--owner--math/snapshots/{HASH}", "owner/math"),
        (f"/cache/models--gpt2/snapshots/{HASH}/", "gpt2"),
        ("/home/alice/base+/home/alice/adapter", "base+adapter"),
        (f"owner/base@{HASH}+/home/alice/adapter", f"owner/base@{HASH}+adapter"),
        ("/home/alice/a+b", "a+b"),
    ],
)
def test_a_public_name_has_no_folders(model: str, public: str) -> None:
    assert public_name(model) == public


@given(st.text(alphabet="ab`~\n \x1b", min_size=1, max_size=30))
def test_no_text_ends_its_code(text: str) -> None:
    inline = code(text)
    fence = re.match("`+", inline)
    assert fence is not None and "\n" not in inline and "\x1b" not in inline
    # By CommonMark, the span ends at the first run of exactly as many backticks as open it.
    runs = [run.start() for run in re.finditer("`+", inline) if len(run[0]) == len(fence[0])]
    assert runs[1:] == [len(inline) - len(fence[0])]

    first, *lines, last = yaml_block({"name": text, "list": [text]}).split("\n")
    ticks = first.removesuffix("yaml")
    assert last == ticks and not any(line.strip() == ticks for line in lines)
    assert yaml.safe_load("\n".join(lines)) == {"name": text, "list": [text]}


def test_markdown_is_escaped() -> None:
    assert markdown("a|b\n<img src=x>") == "a\\|b &lt;img src=x\\>"
    assert markdown("[x](y) `c` **d** _e_ &lt;") == "\\[x\\](y) \\`c\\` \\*\\*d\\*\\* \\_e\\_ &amp;lt;"
    assert markdown("math-expert.v1") == "math-expert.v1"


NAME = "x | y |\n\n<script>alert(1)</script> [a](javascript:b) ``` \x1b[31m"


def test_a_hostile_name_adds_nothing_to_the_card(llama_merge: Path, tmp_path: Path) -> None:
    plan = plan_of(llama_merge)
    hostile = plan.config.models[0].model_copy(update={"name": NAME})
    config = plan.config.model_copy(update={"models": (hostile, *plan.config.models[1:])})
    changed = replace(plan, config=config, experts=(replace(plan.experts[0], name=NAME), *plan.experts[1:]))
    cards = []
    for number, one in enumerate((plan, changed)):
        write_card(tmp_path / f"{number}.md", one, learned(one)[0][-1], DIGESTS)
        write_weight_space_card(tmp_path / f"{number}-w.md", one, get_method("linear"), DIGESTS)
        cards.append([(tmp_path / f"{number}{kind}.md").read_text() for kind in ("", "-w")])
    for plain, card in zip(*cards, strict=True):
        assert "\x1b" not in card
        assert len(card.splitlines()) == len(plain.splitlines())
    prose = [re.sub(r"(?ms)^(`{3,})yaml\n.*?^\1$", "", card) for card in cards[1]]
    assert not any("<script" in text for text in prose)
    rows = [[line for line in card.splitlines() if line.startswith("| ")] for card in (cards[0][0], cards[1][0])]
    cells = [[len(re.findall(r"(?<!\\)\|", row)) for row in some] for some in rows]
    assert cells[0] == cells[1] and any("script" in row for row in rows[1]), "the name adds no cells"


def test_card_and_report_tell_chunks_of_directions(llama_merge: Path, tmp_path: Path) -> None:
    for chunks, of_report in (("contiguous", 0), ("spectral", 1), ("direction", 1)):
        plan = plan_of(llama_merge, "parameters.task_vectors=orthogonal", f"parameters.chunks={chunks}")
        merge = Merged.read(str(write_merge(plan, tmp_path / chunks)))
        assert merge.stages[2].layout == learned(plan)[0][1].layout
        sections = {section.title: section for section in sections_of(merge)}
        card = (tmp_path / chunks / "README.md").read_text().partition("## Use it")[0]
        assert ("singular direction" in card) == bool(of_report)
        assert "singular directions" not in sections["Coefficients of stage 1"].text
        assert sections["Coefficients of stage 2"].text.count("singular directions") == of_report
        assert f"{sum(plan.numels.values()):,} elements" in dict(key_figures(merge))["merged"]
        assert merge.importance is not None and sum(merge.importance.numel) == sum(plan.numels.values())


def test_plan_card_and_report_tell_the_steps_after_the_merge(
    llama_merge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(llama_merge, "calibrate=[{method: svc, alpha: 0.7}, featcal]")
    weight_space = plan_of(llama_merge, "merge_method=ties", "calibrate=[{method: svc, alpha: 0.7}, featcal]")
    merge = Merged.read(str(write_merge(plan, tmp_path / "merged")))
    write_weight_space_card(tmp_path / "w.md", weight_space, get_method("ties"), DIGESTS)
    print_weight_space_plan(weight_space, str(tmp_path / "out"))
    cards = [
        path.read_text().partition("## Use it")[0] for path in (tmp_path / "merged" / "README.md", tmp_path / "w.md")
    ]
    for text in (*cards, dict(key_figures(merge))["then"], capsys.readouterr().out):
        assert text.index("svc (alpha 0.7)") < text.index("featcal (alpha 0.3")
    page = report_html([merge])
    assert page.index("then svc") < page.index("then featcal")


@pytest.mark.parametrize("kind", ["whole", "orthogonal", "swudi"])
def test_card_and_report_tell_what_coefficients_multiply(llama_merge: Path, tmp_path: Path, kind: str) -> None:
    plan = plan_of(llama_merge, f"parameters.task_vectors={kind}")
    merge = Merged.read(str(write_merge(plan, tmp_path / kind)))
    card = (tmp_path / kind / "README.md").read_text().partition("## Use it")[0]
    report = {section.title: section for section in sections_of(merge)}["Coefficients of stage 1"].text
    for text in (card, report):
        said = {"orthogonal": "orthogonal task vectors" in text, "swudi": "SWUDI" in text}
        assert said == {name: name == kind for name in said}


def test_cards_and_reports_carry_no_paths(llama_merge: Path, tmp_path: Path) -> None:
    inside = str(llama_merge.parent)
    images = f"calibration.image_folder={json.dumps(inside)}"
    plan = plan_of(llama_merge, images, f"log_dir={json.dumps(inside)}", "cluster.labels.kubernetes_host=node7")
    write_card(tmp_path / "a.md", plan, learned(plan)[0][-1], DIGESTS)
    write_weight_space_card(tmp_path / "b.md", plan, get_method("linear"), DIGESTS)
    (tmp_path / "other").mkdir()
    folders = [write_merge(plan, tmp_path / "merged"), write_merge(plan_of(llama_merge), tmp_path / "other" / "merged")]
    merges = [Merged.read(str(folder)) for folder in folders]
    pages = [report_html(merges[:1]), report_html(merges)]
    assert "merged-2" in pages[1], "two runs of one name are numbered"
    for text in [(tmp_path / "a.md").read_text(), (tmp_path / "b.md").read_text(), *pages]:
        assert inside not in text and str(tmp_path) not in text and "node7" not in text
    front = yaml.safe_load((tmp_path / "a.md").read_text().split("---")[1])
    assert "base_model" not in front, "folders are no models of the hub"
    assert public_config(plan.config).models[0].calibration[0].path == "expert0.jsonl"


def test_the_front_matter_is_what_the_hub_takes(
    llama_merge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def front(**cards: str) -> dict[str, Any]:
        for name, text in cards.items():
            (folder / name / "README.md").write_text(text)
        write_card(tmp_path / "card.md", plan, learned(plan)[0][-1], DIGESTS)
        found: dict[str, Any] = huggingface_hub.ModelCard.load(tmp_path / "card.md").data.to_dict()
        return found

    folder = shutil.copytree(llama_merge.parent, tmp_path / "work")
    plan = plan_of(folder / "merge.yaml")
    given = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    tags = ["merge", "expert-merging", "expert_merging_pp"]
    assert front() == {**given, "tags": tags}
    card = "---\nlicense: other\nlicense_name: our-license\nlicense_link: /etc/passwd\nlanguage: [en, 7, de]\n---\n"
    licensed = {"license": "other", "license_name": "our-license"}
    assert front(base=card) == {**given, **licensed, "language": ["en", "de"], "tags": tags}
    assert "license" in front(expert0="---\nlicense: [mit]\n---\n"), "no license"
    assert "license" not in front(expert0="---\nlicense: mit\n---\n")
    table = (tmp_path / "card.md").read_text().partition("## Models")[2]
    assert "| expert0 | expert0 | mit |" in table and "other our-license" in table
    assert "license" not in front(base="---\n{{{\n---\n", expert0="nothing"), "a card that cannot be read is none"

    on_hub = replace(plan.base, model=f"owner/base@{HASH}"), replace(plan.experts[0], model="owner/math@main")
    plan = replace(plan, base=on_hub[0], experts=(on_hub[1], *plan.experts[1:]))
    monkeypatch.setattr(sources, "weight_files", lambda model: [])  # these are not on this machine
    of_hub = front()
    assert (of_hub["base_model"], of_hub["base_model_relation"]) == (["owner/base", "owner/math"], "merge")
