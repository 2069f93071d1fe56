"""Which merges are solved block by block, and by which rule."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from conftest import plan_of
from errors import refused

from engine.correction.rules import Rule, rule_of
from engine.errors import ConfigError


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_merge(tmp_path_factory.mktemp("merge"))


def test_a_rule_has_the_values_of_the_config(config: Path) -> None:
    assert rule_of(plan_of(config)) is None
    assert rule_of(plan_of(config, "calibrate=featcal")) == Rule(alpha=0.3, rho=2.0, ridge=0.05)
    given = plan_of(config, "merge_method=ties", "calibrate={method: featcal, alpha: 0, ridge: 0.1}")
    assert rule_of(given) == Rule(alpha=0, rho=2.0, ridge=0.1)
    regmean = rule_of(plan_of(config, "merge_method=regmean_plus_plus", "parameters.alpha=0.7"))
    assert regmean == Rule(off_diagonal=0.7, own_blocks=True, normalised=False, with_norms=False)


def test_a_value_that_differs_between_tensors_is_no_rule(config: Path) -> None:
    with refused(ConfigError, where="parameters.alpha"):
        rule_of(plan_of(config, "merge_method=regmean_plus_plus", "parameters.alpha=[0.1, 0.9]"))
