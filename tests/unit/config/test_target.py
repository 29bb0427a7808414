"""What is wanted of a model: read from files, changed by call, and refused with one message that names the key."""

from dataclasses import asdict, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals_ray.config.reader import ConfigError, check
from pals_ray.config.target import SLO_KEYS, TargetConfig, TargetedModel, with_changes
from pals_ray.types import Slo, Target

LIMITS = st.none() | st.floats(1e-6, 1e6)
SLOS = st.builds(
    Slo,
    ttft_s=LIMITS,
    tpot_s=LIMITS,
    attainment=st.floats(0, 1, exclude_min=True, exclude_max=True),
    window_s=st.floats(10, 1e6),
    itl_p99_s=LIMITS,
)
TARGETS = st.builds(
    Target, slo=SLOS, throughput_tokens_per_s=LIMITS, priority=st.integers(0, 9), min_share=st.floats(0, 1)
)
BAD = [
    ("attainment", 0.0, "slo.attainment: Input should be greater than 0"),
    ("attainment", 1.0, "slo.attainment: Input should be less than 1"),
    ("attainment", 99, "slo.attainment"),
    ("attainment", float("nan"), "slo.attainment"),
    ("attainment", None, "slo.attainment"),
    ("window_s", 9.9, "slo.window_s: Input should be greater than or equal to 10"),
    ("window_s", float("inf"), "slo.window_s"),
    *((name, value, f"slo.{name}") for name in ("ttft_s", "tpot_s", "itl_p99_s") for value in (0, -1)),
    *((name, float(value), f"slo.{name}") for name in ("ttft_s", "tpot_s", "itl_p99_s") for value in ("nan", "inf")),
    ("tpot_s", "fast", "slo.tpot_s"),
]
OLD = "no longer known: limit a request's time to first token by slo.ttft_s, its time per output token by slo.tpot_s"


def lines(refused):
    """What is said below the first line."""
    return str(refused.value).splitlines()[1:]


def test_without_a_word_nothing_is_limited_and_99_percent_in_five_minutes_would_be_asked():
    assert TargetConfig().target() == Target() == Target(slo=Slo(None, None, 0.99, 300.0, None))


@given(TARGETS)
def test_every_possible_target_can_be_written(target):
    assert TargetConfig.model_validate(asdict(target)).target() == target


@given(TARGETS, st.data())
def test_a_change_of_one_value_leaves_the_others(target, data):
    other = data.draw(TARGETS)
    flat = {name: getattr(other.slo, name) for name in SLO_KEYS} | {
        part.name: getattr(other, part.name) for part in fields(Target) if part.name != "slo"
    }
    name = data.draw(st.sampled_from(sorted(flat)))
    changed = with_changes(target, {name: flat[name]}, "refused")
    before = asdict(target)
    (before["slo"] if name in SLO_KEYS else before)[name] = flat[name]
    assert asdict(changed) == before


@pytest.mark.parametrize(("name", "value", "says"), BAD)
def test_a_wrong_value_is_refused_in_a_file_and_by_call_in_one_line(name, value, says):
    with pytest.raises(ConfigError) as in_file:
        check(TargetedModel, {"target": {"slo": {name: value}}}, "fleet.yaml cannot be used")
    with pytest.raises(ConfigError) as by_call:
        with_changes(Target(), {name: value}, "the target stays as it is")
    for refused in (in_file, by_call):
        (line,) = lines(refused)
        assert line.startswith(f"  target.{says}")
        assert "given: " in line


@pytest.mark.parametrize("old", [["ttft_p99_s"], ["itl_p99_s"], ["ttft_p99_s", "itl_p99_s"]])
def test_the_limits_of_earlier_versions_are_refused_with_the_new_names(old):
    with pytest.raises(ConfigError) as refused:
        check(TargetedModel, {"target": dict.fromkeys(old, 1.0)}, "fleet.yaml cannot be used")
    (line,) = lines(refused)
    assert line.startswith(f"  target: {' and '.join(old)} {'is' if len(old) == 1 else 'are'} {OLD}")
    assert "slo.itl_p99_s" in line


def test_by_call_the_old_ttft_limit_is_refused_too_and_a_limit_on_gaps_has_its_name_still():
    with pytest.raises(ConfigError, match=OLD):
        with_changes(Target(), {"ttft_p99_s": 1.0}, "the target stays as it is")
    assert with_changes(Target(), {"itl_p99_s": 0.1}, "refused") == Target(slo=Slo(itl_p99_s=0.1))


def test_an_slo_in_the_wrong_place_is_told_where_it_belongs():
    with pytest.raises(ConfigError, match=r"write target: \{slo: "):
        check(TargetedModel, {"slo": {"ttft_s": 1.0}}, "fleet.yaml cannot be used")
    with pytest.raises(ConfigError, match="by their own names, ttft_s, tpot_s, attainment, window_s, itl_p99_s"):
        with_changes(Target(), {"slo": {"ttft_s": 1.0}}, "the target stays as it is")
