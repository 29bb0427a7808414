"""The test hosts themselves: what a cut, a slow link and a power cut do, before any Ray is on them."""

import subprocess
from pathlib import Path

import pytest

from tests.hosts import network
from tests.hosts.network import Network
from tests.support.fleets import wait_for

pytestmark = pytest.mark.skipif(network.missing() is not None, reason=str(network.missing()))


def test_nothing_is_left_of_a_network_that_was_closed():
    with Network("three") as net:
        (host,) = net.hosts
        host.run("sleep 62 >/dev/null 2>&1 &")
        wait_for(lambda: _sleepers(62), 5, "the process does not start", 0.05)
        host.slow(delay_s=0.01, loss=0.0)
        folder = net.folder
    wait_for(lambda: not _sleepers(62), 5, "a process outlives its network", 0.05)
    assert not folder.exists()
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    assert "three" not in links
    assert not Path("/run/netns/pals-three").exists()


@pytest.fixture(scope="module")
def hosts():
    with Network("one", "two", environment={"GREETING": "hello"}) as net:
        yield net.hosts


def _reaches(host, other):
    return host.run(f"bash -c '(exec 3<>/dev/tcp/{other.address}/22) 2>/dev/null'", check=False).returncode == 0


def test_a_host_has_its_own_name_address_home_and_processes_and_reaches_the_others(hosts):
    one, two = hosts
    assert one.run("hostname; hostname -I; echo $HOME $GREETING").stdout.split() == [
        "pals-one",
        one.address,
        str(one.home),
        "hello",
    ]
    assert one.run("python3 -c 'import socket; print(socket.gethostbyname(socket.gethostname()))'").stdout.split() == [
        one.address
    ]
    two.run("sleep 60 >/dev/null 2>&1 &")
    wait_for(lambda: _sleepers(60), 5, "the process does not start", 0.05)
    assert one.run("pgrep -x sleep", check=False).stdout == ""
    assert _reaches(one, two)


def test_a_link_that_is_cut_carries_nothing_until_it_is_healed(hosts):
    one, two = hosts
    two.cut()
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            two.run("true", timeout_s=2)
    finally:
        two.heal()
    wait_for(lambda: _reaches(one, two), 20, "the link does not heal")


def test_a_slow_link_delays_each_way_and_loses_frames(hosts):
    two = hosts[1]
    two.slow(delay_s=0.2, loss=0.0)
    try:
        probe = "import socket, time; t = time.monotonic(); s = socket.create_connection(('{}', 22)); s.recv(8)"
        out = hosts[0].run(f'python3 -c "{probe.format(two.address)}; print(time.monotonic() - t)"').stdout
        print(f"\nconnected and greeted in {float(out):.2f} s over 200 ms each way")
        assert 0.8 <= float(out) < 3  # two round trips; the first one may have to ask for the address too
    finally:
        two.heal()
    two.slow(delay_s=0.0, loss=1.0)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            two.run("true", timeout_s=2)
    finally:
        two.heal()
    wait_for(lambda: two.run("true", check=False).returncode == 0, 20, "the link does not heal")


def test_a_power_cut_ends_every_process_and_keeps_the_disk(hosts):
    two = hosts[1]
    two.run("echo kept > ~/file; setsid sleep 61 >/dev/null 2>&1 &")
    wait_for(lambda: _sleepers(61), 5, "the process does not start", 0.05)
    two.power_off()
    wait_for(lambda: not _sleepers(61), 5, "a process outlives its host", 0.05)
    two.boot()
    assert two.run("cat ~/file; pgrep -x sleep", check=False).stdout == "kept\n"


def _sleepers(seconds):
    command = f"sleep\0{seconds}\0"
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_text() == command:
                found.append(path)
        except OSError:
            continue
    return found
