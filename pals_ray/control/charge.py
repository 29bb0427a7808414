"""What a GPU group is charged at a cap, and the cap that a charge pays for, for ledger and agent alike."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pals_ray.control.snapshot import Overhead

#: Drivers take limits in whole mW: caps are rounded down to that, so that no group costs more than its charge.
LIMIT_STEPS_PER_W = 1000

#: Slack for sums of floating-point watts; a millionth of a watt is no power.
EPS_W = 1e-6


@dataclass(frozen=True, slots=True)
class ChargeTerms:
    """How one group of GPUs is charged: fixed when it claims its GPUs, the same for agent and ledger.

    `floors_w` holds one value per GPU: the draw at the device's clock floor where that is above the lowest limits,
    else 0. `node_gpus` is the number of managed GPUs on the node. `least_charge_w` and `most_charge_w` are with every
    GPU at the lowest and highest limit. All W; limits are per GPU, charges at node level.
    """

    overhead: Overhead
    node_gpus: int
    min_limit_w: float
    max_limit_w: float
    floors_w: tuple[float, ...]
    least_charge_w: float = field(init=False, repr=False, compare=False)
    most_charge_w: float = field(init=False, repr=False, compare=False)

    @property
    def num_gpus(self) -> int:
        """GPUs in the group."""
        return len(self.floors_w)

    def __post_init__(self) -> None:
        # They are stored because a ledger uses them thousands of times a second.
        object.__setattr__(self, "least_charge_w", self.charge_w(self.min_limit_w))
        object.__setattr__(self, "most_charge_w", self.charge_w(self.max_limit_w))

    def charge_w(self, cap_w: float) -> float:
        """Charge with every GPU at `cap_w`, W: a GPU occupies its clock floor's draw where that is above the cap."""
        gpu_w = sum(max(cap_w, floor_w) for floor_w in self.floors_w)
        return self.overhead.charge_w(gpu_w, self.num_gpus, self.node_gpus)

    def cap_w(self, charge_w: float) -> float:
        """The largest common cap that `charge_w` pays for, W, inside the device's range.

        A charge under the least one gives the lowest limit all the same: a device cannot go below it.
        """
        left_w = self.overhead.gpu_w(charge_w, self.num_gpus, self.node_gpus)
        cap_w = 0.0
        # GPUs whose clock floor is above the cap take their watts first; the cap divides the rest equally.
        for paid, floor_w in enumerate(sorted(self.floors_w, reverse=True)):
            cap_w = left_w / (self.num_gpus - paid)
            if cap_w >= floor_w:
                break
            left_w -= floor_w
        whole_w = math.floor((cap_w + EPS_W) * LIMIT_STEPS_PER_W) / LIMIT_STEPS_PER_W
        return min(max(whole_w, self.min_limit_w), self.max_limit_w)


def group_terms(
    overhead: Overhead, node_gpus: int, ranges_w: tuple[tuple[float, float], ...], floors_w: tuple[float, ...]
) -> ChargeTerms:
    """Terms of a group whose GPUs have these (lowest, highest) limits, W: the common cap lies in all the ranges."""
    return ChargeTerms(
        overhead=overhead,
        node_gpus=node_gpus,
        min_limit_w=max(low_w for low_w, _ in ranges_w),
        max_limit_w=min(high_w for _, high_w in ranges_w),
        floors_w=floors_w,
    )
