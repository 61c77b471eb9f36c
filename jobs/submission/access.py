"""Where the cluster is and what it asks for; imports nothing of Ray."""

import os
import socket
from pathlib import Path

from pipelines.errors import InputError

TOKEN_FILE = "~/.ray/auth_token"
JOB = "BEIT_JOB"
"""Variable by which a stage knows of which job it is an attempt."""
RETRY = "BEIT_RETRY"
"""Variable that lets a job be tried again although its input was bad."""
ANSWER_SECONDS = 10.0
NO_CLUSTER = "unset it to start Ray here, or name a running cluster (host:6379)"


class ClusterAwayError(Exception):
    """The dashboard did not answer; it may again."""


def token_file() -> Path:
    """Where Ray keeps a token for its commands."""
    return Path(TOKEN_FILE).expanduser()


def require_cluster(address: str) -> None:
    """Asks whether anybody is at RAY_ADDRESS: Ray itself would try for minutes in silence.

    Raises:
        InputError: it is of another kind, or nobody answers within seconds.
    """
    if address == "auto":
        return
    if "://" in address:
        raise InputError(
            f"RAY_ADDRESS = {address!r}: stages join a cluster as host:port; from outside of it "
            f"use `beit submit STAGE --address http://HEAD:8265 -- FLAGS`, or {NO_CLUSTER}"
        )
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, ValueError) as error:
        raise InputError(
            f"RAY_ADDRESS = {address!r}: no Ray cluster answers there ({error}); {NO_CLUSTER}"
        ) from error


def find_address(given: str) -> str:
    """The dashboard's address: the flag, or Ray's variables.

    Raises:
        InputError: none is given, or it is no http address.
    """
    source, address = "--address", given
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        if not address:
            source, address = name, os.environ.get(name, "")
    if not address:
        raise InputError(
            "--address: name the cluster's dashboard, as in --address http://head:8265, or set "
            "RAY_API_SERVER_ADDRESS"
        )
    if not address.startswith(("http://", "https://")):
        raise InputError(
            f"{source} = {address!r}: jobs are submitted to the dashboard of the cluster; give its "
            "http:// address, usually port 8265"
        )
    return address.rstrip("/")


def use_token() -> str:
    """Lets Ray's client send the token it finds; returns where that is, "" without one.

    Ray 2.60 reads a token only in mode `token`, although the file and the variables are there, and
    asks for the mode when it is imported: call this before. A cluster without tokens ignores it.
    """
    places = {
        "RAY_AUTH_TOKEN": bool(os.environ.get("RAY_AUTH_TOKEN")),
        "RAY_AUTH_TOKEN_PATH": bool(os.environ.get("RAY_AUTH_TOKEN_PATH")),
        TOKEN_FILE: token_file().is_file(),
    }
    found = next((name for name, there in places.items() if there), "")
    if found:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    return found if os.environ.get("RAY_AUTH_MODE") == "token" else ""
