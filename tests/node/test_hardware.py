"""The device that computes is named, or said not to be here."""

from __future__ import annotations

import pytest

from gridmill.node.hardware import DeviceError, pick_device


def test_a_cpu_is_always_here() -> None:
    cpu = pick_device("cpu")
    assert (cpu.name, cpu.kind) == ("cpu", "cpu")
    assert cpu.memory_bytes > 1 << 28 and "CPU" in cpu.label


def test_auto_picks_something_that_can_be_asked_for_by_name() -> None:
    found = pick_device("auto")
    assert pick_device(found.name) == found


def test_a_device_that_is_not_here_is_refused_with_what_is() -> None:
    with pytest.raises(DeviceError, match=r"--device cuda:99 is not here .*--device cpu always works"):
        pick_device("cuda:99")
