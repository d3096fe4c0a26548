"""Whether a cluster can ever place the trials of a search, and how many of them at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from palf_dist.errors import ClusterError

Resources = Mapping[str, float]


def trials_at_once(bundles: Sequence[Resources], nodes: Sequence[Resources], wanted: int) -> int:
    """How many trials, at most ``wanted``, can run at once.

    ``bundles``: what one trial takes, each bundle of one node; ``nodes``: what each node has, as Ray names it. Raises
    ClusterError where not even one trial can ever be placed.
    """
    free = [dict(node) for node in nodes]
    count = 0
    while count < wanted and _place(bundles, free):
        count += 1
    if not count:
        raise ClusterError(
            f"target: one trial takes {_named(_total(bundles))} in {len(bundles)} bundle(s), the largest "
            f"{_named(max(bundles, key=_size))}, and the cluster can never give that: it has {len(nodes)} node(s) with "
            f"{_named(_total(nodes))}; give a trial fewer workers or a worker fewer threads or GPUs, or add nodes"
        )
    return count


def _place(bundles: Sequence[Resources], free: list[dict[str, float]]) -> bool:
    """Take one trial's bundles from the free resources, the largest first, each from the first node that has it."""
    for bundle in sorted(bundles, key=_size, reverse=True):
        for node in free:
            if all(node.get(name, 0.0) + 1e-9 >= amount for name, amount in bundle.items()):
                for name, amount in bundle.items():
                    node[name] = node.get(name, 0.0) - amount
                break
        else:
            return False
    return True


def _size(bundle: Resources) -> tuple[float, float]:
    return bundle.get("GPU", 0.0), bundle.get("CPU", 0.0)


def _total(parts: Sequence[Resources]) -> dict[str, float]:
    names = sorted({name for part in parts for name in part if name in ("CPU", "GPU")})
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}


def _named(resources: Resources) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items() if amount) or "nothing"
