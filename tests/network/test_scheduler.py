"""Placement is a pure function: the same picture gives the same node."""

from gridmill.network.registry import NodeView, Snapshot
from gridmill.network.scheduler import Full, Placement, expected_seconds, place
from gridmill.wire.messages import NodeId, OwnerId


def node(name: str, *, slots: int = 4, busy: int = 0, speed: float = 100.0, draining: bool = False) -> NodeView:
    return NodeView(NodeId(name), OwnerId("owner"), slots, busy, draining, speed, speed * 10)


def choose(*nodes: NodeView, excluded: tuple[str, ...] = ()) -> Placement | Full:
    picture = Snapshot({"class": nodes} if nodes else {})
    return place("class", 100, 100, picture, excluded=[NodeId(name) for name in excluded])


def test_the_faster_of_two_idle_nodes_is_chosen() -> None:
    assert choose(node("slow", speed=10), node("fast", speed=50)) == Placement(NodeId("fast"))


def test_among_equals_the_emptier_is_chosen() -> None:
    assert choose(node("a", busy=3), node("b", busy=1)) == Placement(NodeId("b"))


def test_a_full_node_is_passed_over_even_if_it_is_the_fastest() -> None:
    assert choose(node("fast", busy=4, speed=1000), node("slow", speed=1)) == Placement(NodeId("slow"))


def test_draining_and_excluded_nodes_get_nothing() -> None:
    assert choose(node("a", draining=True), node("b")) == Placement(NodeId("b"))
    assert choose(node("a"), node("b"), excluded=("a",)) == Placement(NodeId("b"))


def test_a_class_nobody_serves_is_told_apart_from_one_whose_nodes_are_full() -> None:
    assert choose() == Full("no_node")
    assert choose(node("a"), excluded=("a",)) == Full("no_node")
    assert choose(node("a", draining=True)) == Full("no_node")
    assert choose(node("a", busy=4)) == Full("busy")


def test_crowding_makes_a_node_look_slower() -> None:
    assert expected_seconds(node("a", busy=2), 100, 100) > expected_seconds(node("a"), 100, 100)
