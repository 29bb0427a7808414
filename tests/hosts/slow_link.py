"""A slow, lossy link for kernels without netem: two taps, and a process of its own that carries frames between them.

    python -m tests.hosts.slow_link TAP TAP DELAY_S LOSS

The frames are the kernel's own, so TCP sees what it would on such a link. A frame is lost by a seeded draw.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import select
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_LARGEST_FRAME = 65536
#: How many frames may be under way each way; a longer queue than this is a link that nobody would keep.
_QUEUE = 20_000


class SlowLink:
    """Puts the relay between a port and its bridge; `close` takes it out again and leaves the port without a bridge."""

    def __init__(self, port: str, bridge: str, name: str, delay_s: float, loss: float) -> None:
        """`delay_s` and `loss` (a share) apply to each direction."""
        self._near, self._far, self._segment = f"near-{name}"[:15], f"far-{name}"[:15], f"slow-{name}"[:15]
        self._relay = subprocess.Popen(
            [sys.executable, "-m", "tests.hosts.slow_link", self._near, self._far, str(delay_s), str(loss)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            preexec_fn=die_with_parent,
        )
        assert self._relay.stdout is not None
        assert self._relay.stdout.readline() == b"ready\n", "the relay did not start"
        _ip("link", "add", self._segment, "type", "bridge")
        for device, master in ((self._near, self._segment), (port, self._segment), (self._far, bridge)):
            _ip("link", "set", device, "master", master, "up")
        _ip("link", "set", self._segment, "up")

    def close(self) -> None:
        """End the relay; its taps go with it."""
        self._relay.kill()
        self._relay.wait()
        if self._relay.stdout is not None:
            self._relay.stdout.close()
        _ip("link", "delete", self._segment)


def die_with_parent() -> None:
    """To be called in a child before it becomes another program: SIGKILL when the parent ends, however it does."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def go_before_all() -> None:
    """Have this process run whenever it can: a link is not slower, nor a look later, for what runs on the hosts."""
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)


def _tap(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return fd


def relay(taps: tuple[int, int], delay_s: float, loss: float) -> None:
    """Carry frames both ways for ever, each `delay_s` after it came."""
    chance = random.Random(0)
    under_way: dict[int, deque[tuple[float, bytes]]] = {taps[0]: deque(maxlen=_QUEUE), taps[1]: deque(maxlen=_QUEUE)}
    other = {taps[0]: taps[1], taps[1]: taps[0]}
    while True:
        due_s = min((queue[0][0] for queue in under_way.values() if queue), default=None)
        wait_s = None if due_s is None else max(due_s - time.monotonic(), 0.0)
        readable, _, _ = select.select(taps, [], [], wait_s)
        for tap in readable:
            try:
                frame = os.read(tap, _LARGEST_FRAME)
            except BlockingIOError:
                continue
            if chance.random() >= loss:
                under_way[other[tap]].append((time.monotonic() + delay_s, frame))
        now_s = time.monotonic()
        for tap, queue in under_way.items():
            while queue and queue[0][0] <= now_s:
                try:
                    os.write(tap, queue.popleft()[1])
                except OSError:  # its interface is not up yet, or full: a lost frame
                    continue


def main() -> None:
    near, far, delay_s, loss = sys.argv[1:]
    go_before_all()
    taps = _tap(near), _tap(far)
    print("ready", flush=True)
    relay(taps, float(delay_s), float(loss))


if __name__ == "__main__":
    main()
