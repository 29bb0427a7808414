"""When a replica under constant load is steady: both halves of a window show the same throughput and power."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pals_ray.control.telemetry import Reading


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


@dataclass(frozen=True, slots=True)
class Window:
    """What a replica did between two readings. W of all its GPUs."""

    first: Reading
    last: Reading

    @property
    def elapsed_s(self) -> float:
        """From first to last reading, s."""
        return self.last.time_s - self.first.time_s

    @property
    def throughput_tokens_per_s(self) -> float:
        """Mean output tokens/s."""
        return (_tokens(self.last) - _tokens(self.first)) / self.elapsed_s

    @property
    def power_w(self) -> float:
        """Mean draw of the group, W, by the energy counters."""
        return (self.last.energy_j - self.first.energy_j) / self.elapsed_s

    @property
    def first_tokens(self) -> int:
        """Requests that had their first token in it."""
        return first_tokens(self.last) - first_tokens(self.first)


def steady_window(readings: Sequence[Reading], rule: SteadyRule) -> tuple[Window | None, str]:
    """The longest steady window that ends with the last reading, or None, and why."""
    reason = "no readings yet"
    for start in range(len(readings) - 2):
        whole = Window(readings[start], readings[-1])
        if whole.elapsed_s < rule.least_s:
            reason = reason if start else f"{whole.elapsed_s:.0f} of {rule.least_s:g} s"
            break
        if whole.first_tokens < rule.least_first_tokens:
            reason = reason if start else f"{whole.first_tokens} of {rule.least_first_tokens} first tokens"
            break
        middle_s = (whole.first.time_s + whole.last.time_s) / 2
        middle = min(readings[start + 1 : -1], key=lambda reading: abs(reading.time_s - middle_s))
        said = _held_up(readings[start:], rule) or _difference(
            Window(whole.first, middle), Window(middle, whole.last), rule
        )
        if said is None:
            return whole, f"steady for {whole.elapsed_s:.0f} s"
        reason = said if not start else reason
    return None, reason


def first_tokens(reading: Reading) -> int:
    """Requests that have had their first token since the engine started."""
    return sum(reading.engine.ttft_counts) if reading.engine else 0


def _difference(one: Window, two: Window, rule: SteadyRule) -> str | None:
    """How two halves differ, None where they agree."""
    lump = max(half.last.engine.running if half.last.engine else 0 for half in (one, two))
    before, after = one.throughput_tokens_per_s, two.throughput_tokens_per_s
    allowed = rule.throughput_share * before + lump / min(one.elapsed_s, two.elapsed_s)
    if abs(after - before) > allowed:
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


def _tokens(reading: Reading) -> int:
    return reading.engine.generation_tokens if reading.engine else 0
