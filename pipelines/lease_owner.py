"""Who holds a lease: host, process and job, and whether that process is still alive."""

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A driver, as others are told of it."""

    stage: str
    host: str
    process: int
    machine: str = ""
    """This start of this machine, and what of its processes can be seen; "" where unknown."""
    started: str = ""
    """When the process began, in the kernel's ticks: numbers of processes are used again."""
    job: str = ""
    since: str = ""

    @classmethod
    def here(cls, stage: str, job: str = "") -> "Owner":
        """This process."""
        return cls(
            stage=stage,
            host=socket.gethostname(),
            process=os.getpid(),
            machine=_machine(),
            started=_started(os.getpid()),
            job=job,
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
        )

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"{self.stage} on {self.host}, process {self.process}{job}, since {self.since}"

    def is_gone(self) -> bool:
        """Whether its process was on this machine and has ended; False where that is not known."""
        return bool(self.machine) and self.machine == _machine() and _has_ended(self)


def _machine() -> str:
    """Names what process numbers mean here; "" where the kernel does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _stat(process: int) -> list[str]:
    """State, and what follows it in /proc/N/stat; raises OSError where there is no such process."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def _started(process: int) -> str:
    try:
        return _stat(process)[19]
    except OSError:
        return ""


def _has_ended(owner: Owner) -> bool:
    """/proc alone does not say: it may hide another user's processes (hidepid)."""
    try:
        os.kill(owner.process, 0)  # sends nothing
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it is there, and another user's
    try:
        stat = _stat(owner.process)
    except OSError:
        return False
    # One that was killed and not yet buried (Z, X) writes no more.
    return stat[0] in "ZX" or stat[19] != owner.started
