"""What every test has: its share of two cores, the order of files, and a word on what this machine cannot run."""

import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

# Before torch and numpy are imported, here and in every child: a test machine has two cores, whatever it says, and two
# processes of two threads on them would mostly wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
# A shell that starts the tests in the background has them, and all that they start, ignore the Ctrl-C that some send.
signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((path for path in map(shutil.which, BROWSERS) if path), None)
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")  # often only root's PATH has it
LONGEST = (
    "house/test_readmes.py",
    "journeys/test_road.py",
    "journeys/test_faults.py",
    "house/test_docs.py",
    "export/test_families.py",
    "export/test_export_run.py",
    "learn/test_pipeline.py",
    "learn/test_distributed_cli.py",
    "learn/test_distributed.py",
    "export/test_qat.py",
    "bench/test_gpu_script.py",
)
"""Files of tests that take long, the longest first: begun last, one would go on alone when all others have ended."""
SHARED_DATA = Path(os.environ.get("KDEDGE_SHARED_DATA") or ROOT.parent / "shared" / "data")


@pytest.fixture(scope="session")
def chromium() -> str:
    """The program; tests that use it are marked `browser` and left out where there is none."""
    assert CHROMIUM is not None, "mark this test with pytest.mark.browser"
    return CHROMIUM


@pytest.fixture(scope="session")
def sshd() -> str:
    """OpenSSH's server; tests that use it are marked `sshd` and left out where there is none."""
    assert SSHD is not None, "mark this test with pytest.mark.sshd"
    return SSHD


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The development data beside the checkout; tests that use it are marked `shared_data`."""
    assert SHARED_DATA.is_dir(), "mark this test with pytest.mark.shared_data"
    return SHARED_DATA


@pytest.fixture(scope="session", autouse=True)
def _no_settings_of_this_machine(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A test finds what it made itself, not the data or settings of whoever runs it."""
    for name in [name for name in os.environ if name.startswith("KDEDGE_") and name != "KDEDGE_SHARED_DATA"]:
        del os.environ[name]
    os.environ["KDEDGE_CACHE"] = str(tmp_path_factory.mktemp("cache"))  # nor what an earlier call of the tests kept
    os.environ["KDEDGE_MEASURING"] = "1"  # no test waits for what else is measured on this machine


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # xdist would begin with the files that have the most tests


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    told = config.stash[_LEFT_OUT] = []
    for marker, program, name in (("browser", CHROMIUM, "Chromium"), ("sshd", SSHD, "sshd")):
        if program is None:
            left_out = [item for item in items if item.get_closest_marker(marker)]
            items[:] = [item for item in items if not item.get_closest_marker(marker)]
            config.hook.pytest_deselected(items=left_out)
            told += [f"No {name} on PATH: {len(left_out)} {marker} tests are left out."] if left_out else []
    if not SHARED_DATA.is_dir():
        absent = pytest.mark.skip(reason=f"no development data in {SHARED_DATA} (KDEDGE_SHARED_DATA)")
        for item in items:
            if item.get_closest_marker("shared_data"):
                item.add_marker(absent)
    ranks = {TESTS / name: rank for rank, name in enumerate(LONGEST)}
    assert all(path.is_file() for path in ranks), "LONGEST names a file of tests that is no more"
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_report_collectionfinish(config: pytest.Config, items: Sequence[pytest.Item]) -> list[str]:
    return config.stash.get(_LEFT_OUT, [])


_LEFT_OUT = pytest.StashKey[list[str]]()
