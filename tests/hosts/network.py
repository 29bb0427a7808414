"""Test hosts on this machine: namespaces joined by a bridge, each with an address, an sshd and processes of its own.

A host has its own network, process table, host name, home and /tmp; disk and /dev/shm it shares with the others. Its
first process is an sshd: when that is killed, the kernel kills everything else on the host with it, as a power cut
would. Whoever holds the network sees to it that nothing of it is left.
"""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType

from tests.hosts import slow_link
from tests.hosts.slow_link import die_with_parent
from tests.support.fleets import wait_for

SUBNET = "10.77.0"
BRIDGE = "pals-bridge"
SSHD = Path("/usr/sbin/sshd")
#: Whether the kernel shares cores evenly between sessions, and so between hosts, however nice what runs there is.
AUTOGROUP = Path("/proc/sys/kernel/sched_autogroup_enabled")

_SSHD_CONFIG = """\
HostKey {folder}/host_key
AuthorizedKeysFile {authorized}
StrictModes no
UsePAM no
PermitRootLogin yes
PidFile none
Subsystem sftp internal-sftp
SetEnv PYTHONPATH={home}/pals-ray {environment}
"""
_INIT = """\
set -e
mount --make-rprivate /
mount --bind {environment} {folder}/environment
mount --bind {folder}/tmp /tmp
mkdir -p {environment}
mount --bind {folder}/environment {environment}
mount --bind {folder}/passwd /etc/passwd
mount --bind {folder}/hosts /etc/hosts
mount --bind /dev/null /etc/resolv.conf
hostname {name}
mkdir -p /run/sshd
exec {sshd} -D -e -f {folder}/sshd_config
"""
#: What making hosts takes, tried in namespaces that are gone at once.
_PROBE = """\
mount --make-rprivate /
ip link add bridge type bridge
ip link add near type veth peer name far
ip tuntap add tap mode tap
chrt --fifo 1 true
"""


@cache
def missing() -> str | None:
    """What this machine lacks to make hosts, None where it lacks nothing."""
    if os.geteuid() != 0:
        return "test hosts need root, for network namespaces"
    tools = [tool for tool in ("ip", "rsync", "ssh", "unshare") if shutil.which(tool) is None]
    if not SSHD.exists():
        tools.append("sshd")
    if tools:
        return f"test hosts need {', '.join(tools)}: apt-get install openssh-server iproute2 rsync"
    folders = {Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()} - {Path(sys.prefix)}
    hidden = [str(folder) for folder in folders if folder.is_relative_to("/tmp")]
    if hidden:
        return f"test hosts have a /tmp of their own, without the Python in {' and '.join(hidden)}"
    isolate = ["unshare", "--net", "--pid", "--mount", "--fork", "/bin/sh", "-ec", _PROBE]
    probe = subprocess.run(isolate, capture_output=True, text=True)
    return None if probe.returncode == 0 else f"test hosts need namespaces, bridges and taps: {probe.stderr.strip()}"


@dataclass
class Host:
    """One host: its address, and its home and log as this machine sees them."""

    name: str
    address: str
    folder: Path
    key: Path
    process: subprocess.Popen[bytes] | None = None
    _relay: slow_link.SlowLink | None = field(default=None, repr=False)

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def _port(self) -> str:
        return f"port-{self.name}"

    def boot(self) -> None:
        """Power on: sshd as the first process. Home and disk are as they were left."""
        self.heal()
        enter = ["ip", "netns", "exec", self.name]
        isolate = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*enter, *isolate, "/bin/sh", str(self.folder / "init")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        wait_for(lambda: self.run("true", check=False).returncode == 0, 20, f"{self.name} does not boot")

    def power_off(self) -> None:
        """Every process of the host at once, and no answer from there any more."""
        self.cut()
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def run(self, command: str, *, check: bool = True, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command in a login shell of the host; its output and return code."""
        done = subprocess.run(
            self._ssh(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert not check or done.returncode == 0, f"{self.name}: {command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done

    def begin(self, command: str) -> subprocess.Popen[str]:
        """Begin a command in a login shell of the host, to be talked with by lines."""
        return subprocess.Popen(self._ssh(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def _ssh(self, command: str) -> list[str]:
        options = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
        return ["ssh", *options, "-o", "ConnectTimeout=10", "-i", str(self.key), f"root@{self.address}", command]

    def cut(self) -> None:
        """Cut the host's link: frames vanish, and neither end is told."""
        _ip("link", "set", self._port, "nomaster")

    def heal(self) -> None:
        """Mend a link that was cut or slowed."""
        if self._relay is not None:
            self._relay.close()
            self._relay = None
        _ip("link", "set", self._port, "master", BRIDGE)

    def slow(self, delay_s: float, loss: float) -> None:
        """Delay each frame by `delay_s` in each direction, and lose this share of them."""
        self._relay = slow_link.SlowLink(self._port, BRIDGE, self.name, delay_s, loss)


class Network:
    """N hosts on one bridge, with this machine at `.1`. A context manager: at its end nothing is left of them."""

    def __init__(self, *names: str, environment: dict[str, str] | None = None) -> None:
        """`environment` is what every command on a host finds set."""
        self.folder = Path(tempfile.mkdtemp(prefix="pals-hosts-", dir="/var/tmp"))
        self.key = self.folder / "key"
        self.hosts = [
            Host(f"pals-{name}", f"{SUBNET}.{number}", self.folder / name, self.key)
            for number, name in enumerate(names, 2)
        ]
        self._environment = " ".join(f"{name}={value}" for name, value in (environment or {}).items())
        self._autogroup = AUTOGROUP.read_text().strip() if AUTOGROUP.exists() else "0"

    def __enter__(self) -> Network:
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    def _make(self) -> None:
        _share_by_session("0")  # an agent has a core when it asks for one, though another host's engines are busy
        self._unlink()  # of a run that was killed: its processes died with it, its links did not
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key)], check=True)
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("address", "add", f"{SUBNET}.1/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        for host in self.hosts:
            self._furnish(host)
            self._connect(host)
            host.boot()

    def _furnish(self, host: Host) -> None:
        """The host's own part of the disk: home, /tmp, keys, and an environment that is installed already."""
        host.home.mkdir(parents=True)
        (host.folder / "tmp").mkdir(mode=0o1777)
        (host.folder / "environment").mkdir()
        (host.home / ".bashrc").touch()
        (host.home / ".pals-venv").symlink_to(sys.prefix)
        # What the environment compiles on first use, 45 s of two cores: it was used before.
        for compiled, there in (
            (Path.home() / ".cache" / "vllm", host.home / ".cache" / "vllm"),
            (Path(f"/tmp/torchinductor_{getpass.getuser()}"), host.folder / "tmp" / "torchinductor_root"),
        ):
            if compiled.is_dir():
                shutil.copytree(compiled, there)
        users = Path("/etc/passwd").read_text().splitlines(keepends=True)
        root = f"root:x:0:0:root:{host.home}:/bin/bash\n"
        (host.folder / "passwd").write_text(root + "".join(u for u in users if not u.startswith("root:")))
        # Nobody answers questions for names here: whoever had to ask would wait for it.
        names = "".join(f"{other.address} {other.name}\n" for other in self.hosts)
        (host.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(host.folder / "host_key")], check=True)
        config = _SSHD_CONFIG.format(
            folder=host.folder,
            home=host.home,
            authorized=self.key.with_suffix(".pub"),
            environment=self._environment,
        )
        (host.folder / "sshd_config").write_text(config)
        # The environment is where it is on this machine, though that may be under /tmp.
        init = _INIT.format(folder=host.folder, name=host.name, sshd=SSHD, environment=sys.prefix)
        (host.folder / "init").write_text(init)

    def _connect(self, host: Host) -> None:
        """A veth pair: one end in the host, the other a port of the bridge."""
        _ip("netns", "add", host.name)
        _ip("link", "add", host._port, "type", "veth", "peer", "name", "eth0", "netns", host.name)
        _ip("link", "set", host._port, "up")
        inside = ("-n", host.name)
        _ip(*inside, "link", "set", "lo", "up")
        _ip(*inside, "address", "add", f"{host.address}/24", "dev", "eth0")
        _ip(*inside, "link", "set", "eth0", "up")
        # Ray asks the routing table for its own address; nothing is forwarded.
        _ip(*inside, "route", "add", "default", "via", f"{SUBNET}.1")

    def close(self) -> None:
        """Kill every process of every host, and remove links and folders."""
        for host in self.hosts:
            if host._relay is not None:
                host._relay.close()
            if host.process is not None:
                host.process.kill()
                host.process.wait()
        self._unlink()
        _share_by_session(self._autogroup)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _unlink(self) -> None:
        for host in self.hosts:
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", host.name)
        for link in (BRIDGE, *(host._port for host in self.hosts)):
            with suppress(subprocess.CalledProcessError):
                _ip("link", "delete", link)


def _share_by_session(setting: str) -> None:
    with suppress(OSError):  # a kernel without it, or one that is not ours to set
        AUTOGROUP.write_text(setting)


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)
