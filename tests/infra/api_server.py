"""An emulated Kubernetes API server, as much of it as `kubectl create` and `kubectl get` ask for.

Discovery, creation and reading are real HTTP; an object is admitted as by a server with KubeRay:
its namespace is there, its name is free, and the given check has nothing to say.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# (group and version) to {plural: (kind, namespaced)}
KINDS = {
    "v1": {
        "namespaces": ("Namespace", False),
        "configmaps": ("ConfigMap", True),
        "serviceaccounts": ("ServiceAccount", True),
        "services": ("Service", True),
    },
    "apps/v1": {"statefulsets": ("StatefulSet", True)},
    "networking.k8s.io/v1": {"networkpolicies": ("NetworkPolicy", True)},
    "ray.io/v1": {"rayclusters": ("RayCluster", True), "rayjobs": ("RayJob", True)},
}
Refusal = tuple[int, str]


@contextlib.contextmanager
def started(
    check: Callable[[dict[str, Any]], str],
) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Address of the server, and the objects that it holds by their path. `check` says what is
    wrong with an object, "" if nothing is.
    """
    objects: dict[str, dict[str, Any]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            found = _discovery(path) or objects.get(path)
            self.answer(200, found) if found else self.refuse(404, f"{path}: not found")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            path = f"{self.path.partition('?')[0]}/{body['metadata']['name']}"
            refused = _refusal(path, body, objects, check)
            if refused:
                self.refuse(*refused)
            else:
                objects[path] = body
                self.answer(201, body)

        def refuse(self, code: int, message: str) -> None:
            status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code}
            self.answer(code, {**status, "message": message})

        def answer(self, code: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", objects
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _discovery(path: str) -> dict[str, Any] | None:
    """What kinds there are."""
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        groups = []
        for version in KINDS:
            if version != "v1":
                entry = {"groupVersion": version, "version": version.partition("/")[2]}
                name = version.partition("/")[0]
                groups.append({"name": name, "versions": [entry], "preferredVersion": entry})
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    version = path.removeprefix("/apis/").removeprefix("/api/")
    if version not in KINDS:
        return None
    resources = [
        {"name": plural, "singularName": "", "kind": kind, "namespaced": within,
         "verbs": ["create", "get"]}
        for plural, (kind, within) in KINDS[version].items()
    ]  # fmt: skip
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version,
            "resources": resources}  # fmt: skip


def _refusal(
    path: str, body: dict[str, Any], objects: dict[str, Any], check: Callable[[dict[str, Any]], str]
) -> Refusal | None:
    namespace = body["metadata"].get("namespace")
    if namespace and f"/api/v1/namespaces/{namespace}" not in objects:
        return 404, f'namespaces "{namespace}" not found'
    if path in objects:
        return 409, f"{path} already exists"
    wrong = check(body)
    return (
        (422, f"{body['kind']} {body['metadata']['name']} is invalid: {wrong}") if wrong else None
    )
