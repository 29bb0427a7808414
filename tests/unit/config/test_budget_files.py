"""Files that move a budget: what they mean, and that whatever is unclear is refused with what to write instead."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pals_ray.config.budget_files import load_node_samples, load_schedule, load_signal, parse_schedule
from pals_ray.config.reader import ConfigError
from pals_ray.control.budget.overhead_fit import NodeSample, fit_overhead
from pals_ray.control.budget.schedule import budget_at

DOCS = Path(__file__).parents[3] / "docs" / "budgets.md"


def unix_s(text):
    return datetime.fromisoformat(text).timestamp()


def one_entry(start="2026-07-01 17:00", end=None, zone="Europe/Berlin"):
    content = {"entries": [{"start": start, "end": end, "budget_w": 900}]}
    return content if zone is None else {**content, "time_zone": zone}


def starts_at(content):
    (entry,) = parse_schedule(content, "test").entries
    return datetime.fromtimestamp(entry.start_s, UTC).isoformat()


@pytest.fixture
def write(tmp_path):
    def write(text, name="file.csv"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_the_schedule_of_the_docs_does_what_the_docs_say(write):
    example = re.search(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)[1]
    schedule = load_schedule(write(example, "schedule.yaml"))
    base_w = 3000.0
    watts = {
        "2026-07-01T16:45+02:00": 3000,
        "2026-07-01T16:52:30+02:00": 2700,
        "2026-07-01T17:00+02:00": 2400,
        "2026-07-01T20:00+02:00": 2400,
        "2026-07-01T20:15+02:00": 3000,
        "2026-10-25T02:29:59+01:00": 3000,
        "2026-10-25T02:30+01:00": 2800,
        "2030-01-01T00:00Z": 2800,
    }
    assert {time: budget_at(schedule, base_w, unix_s(time)).budget_w for time in watts} == pytest.approx(watts)


def test_json_and_yaml_mean_the_same(write):
    content = one_entry(end="2026-07-01 20:00")
    as_json = load_schedule(write(json.dumps(content, indent="\t"), "schedule.json"))
    as_yaml = load_schedule(
        write(
            "time_zone: Europe/Berlin\nentries:\n"
            "  - start: 2026-07-01 17:00:00\n    end: 2026-07-01 20:00\n    budget_w: 900\n",
            "schedule.yaml",
        )
    )
    assert as_json == as_yaml


@pytest.mark.parametrize(
    ("start", "zone", "instant"),
    [
        ("2026-07-01 17:00", "Europe/Berlin", "2026-07-01T15:00:00+00:00"),
        ("2026-01-01 17:00", "Europe/Berlin", "2026-01-01T16:00:00+00:00"),
        ("2026-07-01T17:00-07:00", "Europe/Berlin", "2026-07-02T00:00:00+00:00"),
        ("2026-07-01T17:00:30Z", None, "2026-07-01T17:00:30+00:00"),
        ("2026-03-29 03:00", "Europe/Berlin", "2026-03-29T01:00:00+00:00"),
        ("2026-10-25T02:30+02:00", "Europe/Berlin", "2026-10-25T00:30:00+00:00"),
        ("2026-10-25T02:30+01:00", "Europe/Berlin", "2026-10-25T01:30:00+00:00"),
    ],
)
def test_a_time_means_one_instant(start, zone, instant):
    assert starts_at(one_entry(start, zone=zone)) == instant


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (one_entry(zone=None), "entry 1: 2026-07-01 17:00:00 says no time zone; add time_zone"),
        (one_entry("2026-03-29 02:30"), "entry 1: 2026-03-29 02:30:00 does not exist in Europe/Berlin"),
        (
            one_entry("2026-10-25 02:30"),
            "comes twice in Europe/Berlin, .*: 2026-10-25T02:30\\+02:00 or 2026-10-25T02:30\\+01:00",
        ),
        (one_entry("2026-07-01"), "entries.0.start: 2026-07-01 is not a time; write it as 2026-07-01 17:00"),
        (one_entry(1_782_907_200), "entries.0.start: 1782907200 is not a time"),
        (one_entry("2026-07-01 25:00"), "entries.0.start: 2026-07-01 25:00 is not a time"),
        (one_entry(end="2026-07-01 17:00"), "entry 1: ends at 2026-07-01 17:00:00, which is not after its start"),
        (one_entry(zone="Berlin"), "time_zone: unknown time zone 'Berlin'"),
        (one_entry(zone="../etc/passwd"), "time_zone: unknown time zone"),
        ({"entries": []}, "entries: there is none"),
        ({"entries": [{"budget_w": 0}]}, "entries.0.budget_w: .* greater than 0 .given: 0"),
        ({"entries": [{"budget_w": float("nan")}]}, "entries.0.budget_w: "),
        ({"entries": [{"budget_w": 9, "ramp_s": -1}]}, "entries.0.ramp_s: "),
        ({"entries": [{"budget_w": 9, "watts": 9}]}, "entries.0.watts: no such key"),
        ({}, "entries: Field required"),
        ([], "must hold a mapping"),
    ],
)
def test_an_unclear_schedule_is_refused_with_what_to_write(content, message):
    with pytest.raises(ConfigError, match=message):
        parse_schedule(content, "the schedule")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "{", "a.yaml is not YAML"),
        ("a.json", "{", "a.json is not JSON"),
        ("a.yaml", "", "must hold a mapping"),
    ],
)
def test_what_is_no_schedule_file_is_refused(write, name, text, message):
    with pytest.raises(ConfigError, match=message):
        load_schedule(write(text, name))


def test_a_missing_file_is_named(tmp_path):
    for load in (load_schedule, load_signal, load_node_samples):
        with pytest.raises(ConfigError, match=r"cannot read the \w+ .*nowhere: No such file"):
            load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text",
    [
        "value\n0.5\n-0.5\n1\n",
        "0.5\n-0.5\n1\n",
        "time_s,value\n0,0.5\n2,-0.5\n4,1\n",
        "100,0.5\n102,-0.5\n104,1\n",
        "Time;RegD\n00:00:00;0.5\n00:00:02;-0.5\n00:00:04;1\n",
        "timestamp\trega\tregd\n2026-07-01 00:00:00\t9\t0.5\n2026-07-01T00:00:02\t9\t-0.5\n2026-07-01 00:00:04\t9\t1\n",
        "\ufeff# from the grid\n\nt, y\n0, 0.5\n2, -0.5\n4, 1\n",
    ],
)
def test_a_signal_is_read_in_its_usual_forms(write, text):
    signal = load_signal(write(text))
    assert signal.time_s.tolist() == [0, 2, 4]
    assert signal.value.tolist() == [0.5, -0.5, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("value\n0.5\n1.5\n", r"line 3: 1.5 is not in \[-1, 1\]"),
        ("value\n0.5\nhigh\n", "line 3: 'high' is not a number"),
        ("value\n0.5\nnan\n", "line 3: 'nan' is not a number"),
        ("time,value\n0,0.5\n0,0.5\n", "line 3: the time is not after"),
        ("time,value\n0,0.5\n2\n", "line 3: only 1 columns"),
        ("time,value\n0,0.5\n2026-02-30 00:00,0.5\n", "line 3: '2026-02-30 00:00' is not a time"),
        ("time,01-JAN,02-JAN\n0,0.5,0.5\n", "needs one column named value or .*only time, 01-JAN, 02-JAN"),
        ("time,value,regd\n0,0.5,0.5\n", "two columns of this kind"),
        ("1,2,3\n", "has 3 columns without names"),
        ("value\n0.5\n", "two at least"),
        ("value\n", "two at least"),
        ("\n\n", "holds no rows"),
    ],
)
def test_a_signal_that_cannot_be_followed_is_refused_by_line(write, text, message):
    with pytest.raises(ConfigError, match=message):
        load_signal(write(text))


def test_node_samples_carry_their_lines_to_the_fit(write):
    lines = [f"{t},{500 + 1.1 * gpu_w},{gpu_w}" for t, gpu_w in enumerate(range(300, 2800, 100))]
    samples = load_node_samples(write("time,node_w,gpu_w\n" + "\n".join(lines)))
    assert samples[0] == NodeSample(2, 830.0, 300.0)
    overhead = fit_overhead(samples).overhead
    assert (overhead.a_w, overhead.b) == pytest.approx((500, 0.1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node_w,gpu\n1,1\n", "needs one column named gpu_w or gpu_watts or gpu_power_w, and has only node_w, gpu"),
        ("node_w,gpu_w\n700,\n", "line 2: '' is not a number"),
    ],
)
def test_node_samples_that_cannot_be_read_are_refused_by_line(write, text, message):
    with pytest.raises(ConfigError, match=message):
        load_node_samples(write(text))
