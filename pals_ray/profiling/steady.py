"""When a replica under constant load is steady: both halves of a window show the same throughput and power."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pals_ray.control.telemetry import Reading, between


@dataclass(frozen=True, slots=True)
class SteadyRule:
    """A window counts as steady if it lasts `least_s`, holds `least_first_tokens` first tokens, and its halves differ
    by at most these shares in throughput (and one engine step more, which counts tokens in lumps) and in power.

    A host that is too busy would be measured instead of the replica. So on average `least_fill` of the batch limit must
    run, and steps on virtual GPUs must keep at least `least_pace` of the modelled speed.
    """

    least_s: float = 15.0
    least_first_tokens: int = 4
    throughput_share: float = 0.03
    power_share: float = 0.02
    least_fill: float = 0.85
    least_pace: float = 0.95


def steady_window(readings: Sequence[Reading], rule: SteadyRule = SteadyRule()) -> tuple[Reading | None, str]:
    """The first reading of the longest steady window that ends with the last one, or None, and why."""
    reason = "no readings yet"
    for start in range(len(readings) - 2):
        first, last = readings[start], readings[-1]
        elapsed_s, requests = last.time_s - first.time_s, first_tokens(last) - first_tokens(first)
        if elapsed_s < rule.least_s:
            reason = reason if start else f"{elapsed_s:.0f} of {rule.least_s:g} s"
            break
        if requests < rule.least_first_tokens:
            reason = reason if start else f"{requests} of {rule.least_first_tokens} first tokens"
            break
        middle_s = (first.time_s + last.time_s) / 2
        middle = min(readings[start + 1 : -1], key=lambda reading: abs(reading.time_s - middle_s))
        said = _held_up(readings[start:], rule) or _difference(first, middle, last, rule)
        if said is None:
            return first, f"steady for {elapsed_s:.0f} s"
        reason = said if not start else reason
    return None, reason


def first_tokens(reading: Reading) -> int:
    """Requests that have had their first token since the engine started."""
    return sum(reading.engine.ttft_counts) if reading.engine else 0


def _difference(first: Reading, middle: Reading, last: Reading, rule: SteadyRule) -> str | None:
    """How the halves of a window differ, None where they agree."""
    one, two = between(first, middle), between(middle, last)
    before, after = one.throughput_tokens_per_s, two.throughput_tokens_per_s
    lump = max(one.running, two.running) / min(middle.time_s - first.time_s, last.time_s - middle.time_s)
    if abs(after - before) > rule.throughput_share * before + lump:
        return f"throughput went from {before:.4g} to {after:.4g} tokens/s"
    if abs(two.power_w - one.power_w) > rule.power_share * one.power_w:
        return f"power went from {one.power_w:.0f} to {two.power_w:.0f} W"
    return None


def _held_up(readings: Sequence[Reading], rule: SteadyRule) -> str | None:
    """How a busy host slows the replica down, None where it does not."""
    engines = [reading.engine for reading in readings if reading.engine is not None]
    first, last = engines[0], engines[-1]
    running = sum(engine.running for engine in engines) / len(engines)
    if running < rule.least_fill * last.batch_limit:
        return f"only {running:.1f} of {last.batch_limit} run: requests take too long to come in, is this machine busy?"
    wall_s = last.wall_s - first.wall_s
    pace = (last.modelled_s - first.modelled_s) / wall_s if wall_s > 0 else 1.0
    if pace < rule.least_pace:
        return f"steps run at {pace:.2f} of the modelled speed: this machine is too busy for its virtual GPUs"
    return None
