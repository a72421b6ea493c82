"""A clock for the modules under test, while the threads of other tests keep the real one."""

import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest


def set_time(
    monkeypatch: pytest.MonkeyPatch,
    *modules: ModuleType,
    time_: Callable[[], float] | None = None,
    monotonic: Callable[[], float] | None = None,
    sleep: Callable[[float], object] | None = None,
) -> None:
    """Replace functions of `time`, as these modules see them.

    To patch `module.time.sleep` is to patch `time.sleep` for the whole process: a server of an earlier test that still
    sleeps in its thread would then move the clock.
    """
    given = {"time": time_, "monotonic": monotonic, "sleep": sleep}
    replaced = {name: function for name, function in given.items() if function is not None}
    for module in modules:
        monkeypatch.setattr(module, "time", SimpleNamespace(**{**vars(time), **replaced}))
