"""A real bundle walked through by `run.pyz`, somewhere else than where it was exported, and what is worth recording.

Used by `make arm64` and `make interpreters`, which are no part of the suite: they download, and take minutes.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "Wrong", "cache", "compare", "make_bundle", "run_pyz", "walk"]

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 100
Run = Callable[..., dict[str, Any]]


class Wrong(Exception):
    """The proof does not hold; a sentence."""


def cache(name: str) -> Path:
    """A folder outside of the checkout for what is downloaded."""
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = base / "kdedge" / "proofs" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def make_bundle() -> Path:
    """BUNDLE of the environment; else `tiny` on the digits, exported here with eval.npz by what is checked out."""
    named = os.environ.get("BUNDLE")
    if named:
        return Path(named).resolve()
    folder = cache("bundle")
    run, bundle = folder / "run", folder / "bundle"
    kdedge = [sys.executable, "-m", "kdedge"]
    if not (run / "result.json").is_file():
        say("Training the recipe tiny, once")
        subprocess.run(
            [*kdedge, "train-recipe", "tiny", "--out", str(run), "--json"], check=True, stdout=subprocess.DEVNULL
        )
    say("Exporting it")
    export = ["export", str(run), "--int8", "--with-eval", str(IMAGES), "--out", str(bundle), "--json"]
    subprocess.run([*kdedge, *export], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return bundle


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def run_pyz(python: Sequence[str], bundle: Path, environment: dict[str, str]) -> Run:
    """run("check", ...) -> the JSON document of that interpreter. Wrong where it exits with another code than 0."""

    def run(*arguments: str) -> dict[str, Any]:
        command = [*python, str(bundle / "run.pyz"), *arguments, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode != 0:
            raise Wrong(f"{' '.join(arguments)} exited with {done.returncode}: {done.stdout or done.stderr}")
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    return run


def walk(run: Run, bundle: Path) -> dict[str, Any]:
    """info, check, eval, predict and bench: what they answered, without paths, and without times, which say nothing."""
    info, check = run("info"), run("check")
    shard = str(bundle / "eval.npz")
    proved = {}
    for name in check["golden"]:
        scored, answered = run("eval", "--artifact", name), run("predict", shard, "--artifact", name)
        proved[name] = {
            **check["golden"][name],
            "accuracy": scored["accuracy"],
            "images": scored["images"],
            "classes": [each["class"] for each in answered["predictions"]],
            "probabilities": [each["probability"] for each in answered["predictions"]],
        }
    record = run("bench", "--seconds", "0", "--runs", "3", "--artifact", "fp32")
    if record["latency_ms"]["compute"]["count"] != 3:
        raise Wrong(f"bench made {record['latency_ms']['compute']['count']} runs; 3 were asked for")
    return {
        "python": info["python"],
        "architecture": info["machine"]["architecture"],
        "runtimes": info["runtimes"],
        "files": len(check["files"]),
        "proved": proved,
    }


def compare(here: dict[str, Any], there: dict[str, Any]) -> dict[str, Any]:
    """Of every artifact how far the answers there are from those here; Wrong where they are others.

    The logits are compared by `check`, whose tolerance the manifest gives. Of the images of eval.npz, where an answer
    is a close thing another order of additions may turn it: 2 in 100 are let pass.
    """
    found = {}
    for name, mine in here["proved"].items():
        theirs = there["proved"].get(name)
        if theirs is None:
            raise Wrong(f"'{name}' was not run there")
        same = sum(a == b for a, b in zip(mine["classes"], theirs["classes"], strict=True)) / len(mine["classes"])
        found[name] = {
            "golden_max_abs_difference": theirs["max_abs_difference"],
            "golden_tolerance": theirs["tolerance"],
            "images": theirs["images"],
            "accuracy_here": mine["accuracy"],
            "accuracy_there": theirs["accuracy"],
            "same_class": same,
            "probability_max_abs_difference": max(
                abs(a - b) for a, b in zip(mine["probabilities"], theirs["probabilities"], strict=True)
            ),
        }
        if same < 0.98:
            raise Wrong(f"'{name}' gives another class for {1 - same:.0%} of the images there")
    return found
