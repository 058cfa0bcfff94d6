"""What a package shows is what its `__all__` says (after httpx's tests/test_exported_members.py)."""

import importlib
import pkgutil
import types
from collections.abc import Iterator

import pytest

ROOMS = ("kdedge", "kdedge_recipes", "kdedge_export", "kdedge_device", "kdedge_bench")


def modules() -> Iterator[str]:
    for room in ROOMS:
        yield room
        package = importlib.import_module(room)
        for module in pkgutil.walk_packages(package.__path__, f"{room}."):
            if not module.name.endswith("__main__"):
                yield module.name


EVERY = list(modules())


def test_all_rooms_are_looked_at() -> None:
    assert {name.partition(".")[0] for name in EVERY} == set(ROOMS)
    assert len(EVERY) > 50


@pytest.mark.parametrize("name", EVERY)
def test_public_names_are_all(name: str) -> None:
    module = importlib.import_module(name)
    if hasattr(module, "__path__") and not hasattr(module, "__all__"):
        module.__all__ = []  # a package that shows nothing need not say so
    assert isinstance(module.__all__, list)
    assert len(set(module.__all__)) == len(module.__all__)
    missing = [public for public in module.__all__ if not hasattr(module, public)]
    assert missing == []
    if hasattr(module, "__path__"):
        shown = {
            public
            for public, value in vars(module).items()
            if not public.startswith("_") and not isinstance(value, types.ModuleType)
        }
        assert shown == set(module.__all__) - {"__version__"}
