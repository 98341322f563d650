"""Preflight: whether what a run's roles ask for is there or can come, told in seconds instead of a silent wait.

Ray keeps an actor that no node can hold in the state PENDING for ever. So every way onto a cluster comes by here
first: `rlhf plan`, `rlhf submit`, and a run that joins a cluster.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_ray.clusters import Cluster, Growth, Node, look_at
from rlhf_ray.config import Config
from rlhf_ray.errors import ConfigError
from rlhf_ray.roles.seats import Amounts, head_count, needs

TOLERANCE = 1e-6
"""Fractions of a GPU add up to a whole one only about."""
GPU_KEYS = {role: f"resources.{role}_gpus" for role in ("generator", "scorer", "learner")}
COUNT_KEYS = {"generator": "rollout.generators", "scorer": "resources.scorers"}


@dataclass(frozen=True)
class Ask:
    """What a role wants: so many actors, each with these amounts.

    Example: `Ask("generator", 4, {"CPU": 1.0, "GPU": 1.0})`
    """

    role: str
    count: int
    each: Amounts
    needed: int | None = None
    """How many of them the run cannot do without; by default all."""


@dataclass(frozen=True)
class Row:
    """Where the actors of one role will be."""

    ask: Ask
    now: int = 0
    """On nodes that are there and free."""
    grows: int = 0
    """On nodes that the autoscaler may add."""
    waits: int = 0
    """On nodes that are there and that somebody else uses."""
    missing: int = 0
    """Nowhere, however long one waits."""

    @property
    def placed(self) -> int:
        """How many find a place, sooner or later."""
        return self.now + self.grows + self.waits

    def __str__(self) -> str:
        places = {"now": self.now, "on nodes to come": self.grows, "once others are done": self.waits}
        said = [f"{count} {where}" for where, count in places.items() if count]
        said += [f"{self.missing} NOWHERE"] if self.missing else []
        return f"{self.ask.role:<12}{self.ask.count:>6}  {amounts(self.ask.each):<34}{', '.join(said)}"


@dataclass(frozen=True)
class Plan:
    """What came of holding the roles against a cluster."""

    rows: tuple[Row, ...]
    lacks: tuple[str, ...] = ()
    """For each role that finds no place: the missing piece, and the way out."""
    certain: bool = True
    """Whether what is missing cannot come; an autoscaler with unknown limits may still bring it."""

    def __str__(self) -> str:
        head = f"{'role':<12}{'actors':>6}  {'each asks for':<34}find a place"
        return "\n".join([head, *map(str, self.rows)])


def plan(asks: Sequence[Ask], has: Sequence[Node], may_have: Growth) -> Plan:
    """Seats every actor: at first on what is free, then on nodes to come; what fits only an empty cluster waits."""
    today = _seat(asks, [node.free for node in has], may_have)
    ever = _seat(asks, [node.total for node in has], may_have)
    rows = []
    for ask in asks:
        now, grows = today[ask.role]
        unplaced = ask.count - now - grows
        missing = min(unplaced, ask.count - sum(ever[ask.role]))
        rows.append(Row(ask, now=now, grows=grows, waits=unplaced - missing, missing=missing))
    short = [row for row in rows if row.placed < (row.ask.count if row.ask.needed is None else row.ask.needed)]
    lacks = tuple(_lack(row, has, may_have) for row in short)
    return Plan(tuple(rows), lacks, certain=may_have.told != "untold")


def plan_run(config: Config, *, address: str | None = None) -> Plan:
    """The plan of a run on the cluster at an address, by default the config's; without one, on this machine."""
    cluster = look_at(address or config.resources.address, config.resources.cluster)
    return plan(asks_of(config), _with_room(config, cluster), cluster.growth)


def require_room(config: Config, *, address: str | None = None) -> Plan:
    """The plan of a run that can start; raises `ConfigError` with the table where it certainly never could."""
    found = plan_run(config, address=address)
    if found.lacks and found.certain:
        raise ConfigError("\n".join(["the run asks for what the cluster cannot give", str(found), *found.lacks]))
    return found


def asks_of(config: Config) -> list[Ask]:
    """What the roles of a run ask for at their busiest."""
    needed = {"generator": config.rollout.min_generators}
    return [
        Ask(role, count, needs(config.resources, role), needed.get(role)) for role, count in head_count(config).items()
    ]


def amounts(each: Mapping[str, float]) -> str:
    """`1 CPU, 0.5 GPU`; nothing of what is not asked for."""
    return ", ".join(f"{amount:g} {name}" for name, amount in each.items() if amount) or "nothing"


def _with_room(config: Config, cluster: Cluster) -> Sequence[Node]:
    """A Ray started for this run alone gets the seats that its roles ask for; only GPUs are as many as there are."""
    if not cluster.ours:
        return cluster.nodes
    (here,) = cluster.nodes
    wanted: Amounts = {}
    for ask in asks_of(config):
        wanted |= {name: wanted.get(name, 0.0) + ask.count * amount for name, amount in ask.each.items()}
    total = {**wanted, "GPU": here.total.get("GPU", 0.0)}
    return [Node(here.group, total=total, free=total)]


def _seat(asks: Sequence[Ask], nodes: Sequence[Amounts], growth: Growth) -> dict[str, tuple[int, int]]:
    """How many actors of each role find a place: on the nodes, and on those to come.

    First the actors that are hardest to place; each on the node that has the least to spare for it, so that those who
    need no GPU leave the GPUs to others.
    """
    there = [dict(node) for node in nodes]
    to_come: list[Amounts] = []
    left = {group.name: group.count for group in growth.groups}
    seated = {}
    for ask in sorted(asks, key=lambda ask: (-len(_asked(ask.each)), -ask.each.get("GPU", 0.0))):
        now = sum(_take(ask.each, there) for _ in range(ask.count))
        grows = 0
        for _ in range(ask.count - now):
            fresh = [g for g in growth.groups if left[g.name] > 0 and _fits(ask.each, g.each)]
            if not _take(ask.each, to_come):
                if not fresh or len(to_come) >= growth.at_most:
                    break
                group = min(fresh, key=lambda group: _spare(group.each))
                left[group.name] -= 1
                to_come.append(dict(group.each))
                _take(ask.each, to_come)
            grows += 1
        seated[ask.role] = (now, grows)
    return seated


def _take(each: Amounts, nodes: list[Amounts]) -> bool:
    """Takes one actor's amounts from the fitting node with the least to spare."""
    fitting = [node for node in nodes if _fits(each, node)]
    if not fitting:
        return False
    node = min(fitting, key=_spare)
    for name, amount in _asked(each).items():
        node[name] -= amount
    return True


def _fits(each: Amounts, node: Mapping[str, float]) -> bool:
    return all(node.get(name, 0.0) >= amount - TOLERANCE for name, amount in _asked(each).items())


def _asked(each: Amounts) -> Amounts:
    return {name: amount for name, amount in each.items() if amount}


def _spare(node: Mapping[str, float]) -> tuple[float, float]:
    return node.get("GPU", 0.0), node.get("CPU", 0.0)


def _lack(row: Row, has: Sequence[Node], may_have: Growth) -> str:
    """Which piece is missing for a role, and what can be done about it."""
    role, each = row.ask.role, row.ask.each
    kinds = [node.total for node in has] + [group.each for group in may_have.groups]
    most = {name: max((kind.get(name, 0.0) for kind in kinds), default=0.0) for name in _asked(each)}
    short = {name: amount for name, amount in _asked(each).items() if most[name] < amount - TOLERANCE}
    if short:
        best = ", ".join(f"{most[name]:g} {name}" for name in short)
        why = f"each needs {amounts(short)} on one node, and the best node that there is or may be has {best}"
    elif not any(_fits(each, kind) for kind in kinds):
        why = f"no node has {amounts(each)} together"
    else:
        why = f"there is room for {row.placed} of {row.ask.count}"
    return f"{role}: {row.missing} of {row.ask.count} would wait for ever: {why}. {_way_out(row, short, may_have)}"


def _way_out(row: Row, short: Amounts, may_have: Growth) -> str:
    role, ways = row.ask.role, []
    if "GPU" in short:
        ways.append(f"set {GPU_KEYS[role]}=0 to run it on CPU")
    if any(name.startswith("rlhf_") for name in short):
        ways.append("set resources.pin_roles=false")
    if not short and role in COUNT_KEYS and row.placed:
        ways.append(f"set {COUNT_KEYS[role]}={row.placed}")
    if may_have.told == "told":
        ways.append("let the cluster have more or larger nodes (max_workers, maxReplicas)")
    else:
        ways.append("add nodes, or say what the cluster may grow to (resources.cluster=ITS_CONFIG.yaml)")
    return f"Way out: {'; '.join(ways)}"
