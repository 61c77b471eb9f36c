"""A real S3 store for tests: Ceph's radosgw on loopback, or moto's server where Ceph is not there.

Debian: apt-get install --no-install-recommends radosgw ceph-mon ceph-osd. The server is started
once a test session, in a directory of its own, and ended with it. Credentials and options come
from the environment, as users give them; they are set when this module is imported, which is
before any test starts Ray. The port travels in the URI.
"""

import atexit
import functools
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.servers import free_port

ACCESS_KEY, SECRET_KEY, REGION = "testkey", "testsecret123", "us-east-1"
os.environ |= {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_DEFAULT_REGION": REGION,
    "AWS_EC2_METADATA_DISABLED": "true",
    # Ceph of Debian 12 knows no trailing checksums.
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
}
KIND = "ceph" if all(map(shutil.which, ("radosgw", "ceph-mon", "ceph-osd"))) else "moto"
START_SECONDS = 180
START_ATTEMPTS = 10

CEPH_CONF = """
[global]
fsid = {fsid}
mon host = [v1:{address}:{mon_port}]
auth cluster required = none
auth service required = none
auth client required = none
auth allow insecure global id reclaim = true
ms bind msgr2 = false
public addr = {address}
cluster addr = {address}
run dir = {dir}/run
pid file = {dir}/run/$name.pid
log file = {dir}/run/$name.log
admin socket = {dir}/run/$name.asok
keyring = {dir}/keyring
mon data = {dir}/mon
mon data avail warn = 1
mon data avail crit = 1
mon allow pool size one = true
mon warn on pool no redundancy = false
osd data = {dir}/osd
osd objectstore = bluestore
osd memory target = 939524096
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
bluestore block size = 4294967296
bluestore block create = true
bluestore cache autotune = false
bluestore cache size = 134217728
[client.rgw]
rgw frontends = beast endpoint={address}:{port}
rgw data = {dir}/rgw
rgw crypt require ssl = false
rgw thread pool size = 64
"""


@dataclass(frozen=True, kw_only=True)
class S3Store:
    """A running server."""

    kind: str
    port: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def uri(self, *parts: str, port: int | None = None) -> str:
        """s3://bucket/parts with the address of this server, or of a proxy before it."""
        address = quote(f"http://127.0.0.1:{port or self.port}", safe="")
        return f"s3://{'/'.join(parts)}?endpoint_override={address}&region={REGION}"

    def client(self):
        """A boto3 client."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
        )

    def new_bucket(self) -> str:
        """A fresh, empty bucket."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return name


@pytest.fixture(scope="session", params=[KIND])
def s3(request: pytest.FixtureRequest) -> S3Store:
    """The store; the test's id says which one. Import this name into a test module to use it."""
    return start_s3(request.param)


@pytest.fixture
def bucket(s3: S3Store) -> Iterator[str]:
    """A bucket for one test."""
    return s3.new_bucket()


@functools.cache
def start_s3(kind: str = KIND) -> S3Store:
    """Starts the server; it ends with this process."""
    return S3Store(kind=kind, port=_start_ceph() if kind == "ceph" else _start_moto())


def _start_moto(address: str = "127.0.0.1", port: int = 0) -> int:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address=address, port=port, verbose=False)
    server.start()
    atexit.register(server.stop)
    return server.get_host_and_port()[1]


def _start_ceph(address: str = "127.0.0.1", port: int = 0) -> int:
    # Socket paths may have 107 characters, so the directory has a short name.
    directory = Path(tempfile.mkdtemp(prefix="s3-", dir="/tmp"))
    for name in ("run", "mon", "osd", "rgw"):
        (directory / name).mkdir()
    atexit.register(_stop_ceph, directory)
    fsid, port, mon_port = str(uuid.uuid4()), port or free_port(), free_port()
    config = directory / "ceph.conf"
    places = {"dir": directory, "address": address, "port": port, "mon_port": mon_port}
    config.write_text(CEPH_CONF.format(fsid=fsid, **places))

    def ceph(*command: object) -> None:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=directory,
            env=os.environ | {"CEPH_CONF": str(config)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=START_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr.decode()[-2000:]}"

    keyring, monmap = directory / "keyring", directory / "monmap"
    ceph("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.")
    ceph("ceph-authtool", keyring, "-n", "mon.", "--cap", "mon", "allow *")
    ceph("ceph-authtool", keyring, "--gen-key", "-n", "client.admin",
         "--cap", "mon", "allow *", "--cap", "osd", "allow *")  # fmt: skip
    monitor = f"[v1:{address}:{mon_port}]"
    ceph("monmaptool", "--create", "--fsid", fsid, "--addv", "a", monitor, monmap)
    ceph("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
    ceph("ceph-mon", "-i", "a")
    # An OSD that was registered under another id than its own never comes up, without a word.
    osd = str(uuid.uuid4())
    # Both may speak to the monitor before it has learnt the cluster's id, and then give up at once.
    _patiently(ceph, "ceph", "osd", "new", osd)
    ceph("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
    _patiently(ceph, "ceph-osd", "-i", "0")
    ceph("radosgw", "-n", "client.rgw")
    _wait_for(f"http://{address}:{port}/")
    ceph("radosgw-admin", "user", "create", "--uid=test", "--display-name=test",
         f"--access-key={ACCESS_KEY}", f"--secret={SECRET_KEY}")  # fmt: skip
    return port


def _patiently(run: Callable[..., None], *command: object) -> None:
    for attempt in range(START_ATTEMPTS):
        try:
            return run(*command)
        except AssertionError:
            if attempt == START_ATTEMPTS - 1:
                raise
    return None


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.2)
        else:
            return


def _stop_ceph(directory: Path) -> None:
    for name in ("client.rgw", "osd.0", "mon.a"):
        try:
            pid = int((directory / "run" / f"{name}.pid").read_text())
        except (OSError, ValueError):
            continue
        _stop(pid)
    shutil.rmtree(directory, ignore_errors=True)


def _stop(pid: int) -> None:
    for number, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        deadline = time.monotonic() + seconds
        try:
            os.kill(pid, number)
            while time.monotonic() < deadline:
                os.kill(pid, 0)
                time.sleep(0.1)
        except ProcessLookupError:
            return


if __name__ == "__main__":  # ADDRESS PORT: on a host of its own, until that is switched off
    (_start_ceph if KIND == "ceph" else _start_moto)(sys.argv[1], int(sys.argv[2]))
    print("up", flush=True)
    signal.pause()
