"""Traces: the rates, peaks and lengths that were asked for, from files of either format and from synthetic ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals_ray.config.reader import ConfigError
from pals_ray.config.trace_files import MissingTrace, load_trace
from pals_ray.simulation.traces import (
    Trace,
    TraceError,
    bursts,
    clipped,
    continued,
    diurnal,
    lengthened,
    poisson,
    ramped,
    resampled,
)

SAMPLES = Path(__file__).parents[3] / "scenarios" / "traces"
AZURE = Path(__file__).parents[4] / "shared" / "data" / "azure_llm_2023" / "AzureLLMInferenceTrace_conv.csv"


def uneven(n=1200, duration_s=3600.0):
    """A trace that is twice as busy in its second half."""
    place = np.linspace(0, 3, n, endpoint=False)
    arrival_s = np.where(place < 1, place, 1 + (place - 1) / 2) * duration_s / 2
    return Trace(arrival_s, np.arange(n) % 900 + 1, np.arange(n) % 70 + 1, duration_s)


def peak_over_mean(trace):
    """Output tokens of the fullest 5 minutes over those of mean ones, to a minute; the trace is an hour long."""
    tokens = np.histogram(trace.arrival_s, np.linspace(0.0, 3600.0, 61), weights=trace.output_tokens)[0]
    return np.convolve(tokens, np.full(5, 0.2), "valid").max() / tokens.mean()


@pytest.fixture
def write(tmp_path):
    def write(text, name="trace.csv"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_both_formats_say_the_same_of_the_same_requests():
    azure = load_trace(SAMPLES / "azure_sample.csv", "azure")
    mooncake = load_trace(SAMPLES / "mooncake_sample.jsonl", "mooncake")
    assert len(azure) == len(mooncake) == 400
    assert np.allclose(azure.arrival_s, mooncake.arrival_s, atol=2e-3)
    assert np.array_equal(azure.output_tokens, mooncake.output_tokens)
    assert np.array_equal(4 * azure.prompt_tokens, mooncake.prompt_tokens)


def test_azures_published_hour_is_read_whole():
    if not AZURE.is_file():
        pytest.skip(f"no {AZURE}")
    trace = load_trace(AZURE, "azure")
    assert len(trace) == 19_366
    assert trace.duration_s == pytest.approx(3502, abs=1)
    assert trace.output_tokens.mean() == pytest.approx(211.1, abs=0.1)


def test_a_missing_trace_names_the_path_and_where_it_is_published(tmp_path):
    with pytest.raises(MissingTrace, match=r"github\.com/kvcache-ai/Mooncake") as raised:
        load_trace(tmp_path / "gone.jsonl", "mooncake")
    assert str(tmp_path / "gone.jsonl") in str(raised.value)


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("TIMESTAMP,ContextTokens\n", "azure", "GeneratedTokens is missing"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,many,4\n", "azure", "line 2"),
        ('{"timestamp": 1, "input_length": 5}\n', "mooncake", "line 1.*output_length"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 3}\n', "mooncake", "fewer than two"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_line(write, text, kind, said):
    with pytest.raises(ConfigError, match=said):
        load_trace(write(text), kind)


def test_a_resampled_trace_has_the_rate_and_the_peak_that_were_asked_for():
    for rate, peak in ((2.0, 1.2), (0.4, 1.5), (5.0, None)):
        trace = resampled(uneven(), rate, 3600.0, 1, peak)
        assert trace.output_tokens.sum() / 3600.0 == pytest.approx(rate * uneven().output_tokens.mean(), rel=0.01)
        assert peak_over_mean(trace) == pytest.approx(peak_over_mean(uneven()) if peak is None else peak, abs=0.05)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_rate_and_peak_are_of_work_wherever_the_trace_has_its_long_requests(seed, share):
    lengths = uneven()
    prompts = 600 + (500 * np.sin(np.linspace(0, 40, 1200))).astype(int)
    drifting = Trace(lengths.arrival_s, prompts, np.linspace(20, 400, 1200).astype(int), 3600.0)
    trace = resampled(drifting, 1.0, 3600.0, seed, 1.4, share)
    kinds = ((trace.prompt_tokens, prompts, share), (trace.output_tokens, drifting.output_tokens, 1.0 - share))
    work = sum(part * tokens / offered.mean() for tokens, offered, part in kinds)
    assert work.sum() / 3600 == pytest.approx(1.0, rel=0.02)
    peaks = [work[(trace.arrival_s >= t) & (trace.arrival_s < t + 300)].sum() / 300 for t in range(0, 3301, 60)]
    assert max(peaks) == pytest.approx(1.4, abs=0.05)


def test_a_resampled_trace_keeps_pairs_of_lengths():
    trace = uneven()
    pairs = set(zip(trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True))
    again = resampled(trace, 1.0, 600.0, 3)
    assert set(zip(again.prompt_tokens.tolist(), again.output_tokens.tolist(), strict=True)) <= pairs


@pytest.mark.parametrize("seed", range(6))
def test_with_an_own_start_the_rate_begins_where_the_requests_do(seed):
    trace = resampled(uneven(), 2.0, 3600.0, seed, own_start=True)
    first = int(np.random.default_rng(seed).integers(0, 1200))
    busy = (np.arange(0.5, 60) * 60 + uneven().arrival_s[first]) % 3600 >= 1800
    minutes = np.histogram(trace.arrival_s, np.linspace(0, 3600, 61))[0]
    assert minutes[busy].mean() == pytest.approx(2 * minutes[~busy].mean(), rel=0.15)
    together = np.histogram(resampled(uneven(), 2.0, 3600.0, seed).arrival_s, np.linspace(0, 3600, 61))[0]
    assert together[30:].mean() == pytest.approx(2 * together[:30].mean(), rel=0.15)


@given(st.floats(0.0, 900.0))
def test_a_trace_is_continued_with_its_own_beginning(more_s):
    trace = poisson(uneven(), 2.0, 300.0, 1)
    longer = continued(trace, more_s)
    assert longer.duration_s == 300.0 + more_s
    assert np.array_equal(longer.arrival_s[: len(trace)], trace.arrival_s)
    again = longer.arrival_s[len(trace) :] - 300.0
    assert np.allclose(again[: len(trace)], trace.arrival_s[: len(again)])
    assert np.array_equal(longer.output_tokens[len(trace) :][: len(trace)], trace.output_tokens[: len(again)])


def test_bunched_arrivals_stay_bunched():
    pairs_s = np.repeat(np.arange(0, 3600, 6.0), 2)
    trace = Trace(pairs_s, np.ones(1200, int), np.ones(1200, int), 3600.0)
    gaps = np.diff(resampled(trace, 1.0, 1200.0, 1).arrival_s)
    assert np.sum(gaps < 1e-6) >= 590


def test_synthetic_arrivals_have_the_mean_rate_and_their_own_shape():
    lengths = uneven()
    flat = poisson(lengths, 4.0, 6000.0, 5)
    day = diurnal(lengths, 4.0, 6000.0, 5, period_s=6000.0, swing=0.8)
    bursty = bursts(lengths, 4.0, 6000.0, 5)
    for trace in (flat, day, bursty):
        assert len(trace) / 6000 == pytest.approx(4.0, rel=0.03)
    middle = np.sum(np.abs(day.arrival_s - 3000) < 500) / 1000
    assert middle == pytest.approx(4 * (1 + 0.8 * np.sinc(1 / 6)), rel=0.05)
    counts = [np.histogram(t.arrival_s, np.arange(0, 6001, 5))[0] for t in (flat, bursty)]
    assert counts[0].var() / counts[0].mean() < 1.3
    assert counts[1].var() / counts[1].mean() > 2


def test_a_ramp_thins_the_start_and_leaves_the_rest():
    trace = poisson(uneven(), 10.0, 600.0, 1)
    thin = ramped(trace, 200.0, 2)
    counts = [np.histogram(t.arrival_s, [0, 100, 200, 600])[0] for t in (trace, thin)]
    assert counts[1][0] / counts[0][0] == pytest.approx(0.25, abs=0.05)
    assert counts[1][1] / counts[0][1] == pytest.approx(0.75, abs=0.05)
    assert counts[1][2] == counts[0][2]


@given(st.integers(0, 2**32 - 1))
def test_the_same_seed_gives_the_same_requests_and_another_seed_others(seed):
    one, two, other = (bursts(uneven(), 1.0, 300.0, s) for s in (seed, seed, seed + 1))
    assert np.array_equal(one.arrival_s, two.arrival_s)
    assert np.array_equal(one.prompt_tokens, two.prompt_tokens)
    assert not np.array_equal(one.arrival_s, other.arrival_s)


@given(st.floats(0.01, 20), st.integers(16, 4000))
def test_clipped_requests_fit_the_model_and_lose_nothing_else(factor, max_model_len):
    trace = lengthened(uneven(), factor)
    fitted = clipped(trace, max_model_len)
    assert (fitted.prompt_tokens + fitted.output_tokens <= max_model_len).all()
    fits = trace.prompt_tokens + trace.output_tokens <= max_model_len
    assert np.array_equal(fitted.prompt_tokens[fits], trace.prompt_tokens[fits])
    assert np.array_equal(fitted.output_tokens[fits], trace.output_tokens[fits])


@pytest.mark.parametrize(
    ("arrival_s", "tokens", "said"),
    [
        ([2.0, 1.0], [1, 1], "order"),
        ([1.0, 11.0], [1, 1], "within"),
        ([1.0], [0], "at least one"),
        ([1.0], [], "every"),
    ],
)
def test_requests_that_cannot_be_are_refused(arrival_s, tokens, said):
    with pytest.raises(TraceError, match=said):
        Trace(np.array(arrival_s), np.array(tokens, dtype=int), np.ones(len(tokens), dtype=int), 10.0)
