"""Whether what must run at once finds room on the nodes, and whether nodes come when asked for."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """Processes of one kind that a stage needs before it can begin."""

    field: str
    """The flag that decides their number."""
    count: int
    resources: Mapping[str, float]
    """Of each."""
    remedy: str


def shortages(bundles: Sequence[Bundle], nodes: Sequence[Mapping[str, float]]) -> list[str]:
    """What finds no room on empty nodes of these resources, a sentence for each bundle."""
    free = [Counter(node) for node in nodes]
    sentences = []
    for bundle in sorted(bundles, key=lambda bundle: -sum(bundle.resources.values())):
        placed = sum(_place(bundle.resources, free) for _ in range(bundle.count))
        if placed < bundle.count:
            sentences.append(_sentence(bundle, placed, nodes))
    return sentences


def _place(resources: Mapping[str, float], free: list[Counter[str]]) -> bool:
    for node in free:
        if all(node[name] + 1e-6 >= amount for name, amount in resources.items()):
            node.subtract(resources)
            return True
    return False


def _sentence(bundle: Bundle, placed: int, nodes: Sequence[Mapping[str, float]]) -> str:
    each = " and ".join(_said(name, amount) for name, amount in bundle.resources.items() if amount)
    have = " and ".join(
        _said(name, sum(node.get(name, 0) for node in nodes)) for name in bundle.resources
    )
    return (
        f"{bundle.field}: {bundle.count} x {each} are needed at once, {placed} of them fit; the "
        f"cluster has {have} on {len(nodes)} nodes; {bundle.remedy}"
    )


def _said(name: str, amount: float) -> str:
    return f"{amount / 1e9:.3g} GB of memory" if name == "memory" else f"{amount:g} {name}"


def autoscaled() -> bool:
    """Whether an autoscaler adds nodes: then it alone knows what can exist.

    A cluster that was put together by hand has a reporter in its place, whose node types are the
    nodes themselves (`node_` and an id).
    """
    from ray.experimental.internal_kv import _internal_kv_get

    reported = _internal_kv_get("__autoscaling_status")
    if reported:
        report = json.loads(reported).get("autoscaler_report") or {}
        types = [*(report.get("active_nodes") or ()), *(report.get("idle_nodes") or ())]
    else:
        types = _types_of_v2()
    return any(name and not name.startswith("node_") for name in types)


def _types_of_v2() -> list[str]:
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    if not is_autoscaler_v2():
        return []
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    return [str(node.ray_node_type_name) for node in (*status.active_nodes, *status.idle_nodes)]
