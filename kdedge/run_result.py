"""The end of a run: every network scored on the test split, once; predictions.npz and result.json."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdedge.data.leaks import looks_for_near
from kdedge.data.views import columns
from kdedge.methods.health import summary as pseudo_label_summary
from kdedge.models.weights import load_model
from kdedge.models.zoo import build, num_params
from kdedge.predictions import add_predictions
from kdedge.run_begin import Begun, SplitImages
from kdedge.run_pool import held_back_truth
from kdedge.runs import SCHEMA, write_json
from kdedge.train.engine import EnginePlan, as_planned
from kdedge.train.evaluate import accuracy, predict
from kdedge.trust.select import OUTLIER, compare_with_confidence, load_trusted

__all__ = ["finish"]


def finish(begun: Begun, val: SplitImages | None) -> dict[str, Any]:
    """Score and write. Returns what result.json says; the manifest's status is the caller's."""
    run, recipe, splits, stages = begun.run, begun.recipe, begun.splits, begun.notes.done()
    test = begun.load(splits.test)
    logits: dict[str, Tensor] = {}
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "recipe": recipe.name,
        "data": begun.source.name,
        "labels": splits.labels or len(splits.labeled) + len(splits.val),
        "seed": recipe.seed,
        "pretrain": _pretrained(begun, stages),
        "teacher": None,
        "baseline": None,
        "trusted": None,
    }
    for name, stage, path in (
        ("teacher", "outer", run.teacher_path),
        ("student", "inner", run.student_path),
        ("baseline", "baseline", run.baseline_path),
    ):
        if stage in stages:
            scores, logits[name] = _score(begun, path, begun.notes.plan_of(stage), test, val)
            result[name] = scores | {"seconds": stages[stage]["seconds"]}
    result["trusted"], outliers = _trusted(begun) if "trusted" in stages else (None, None)
    result["pseudo_labels"] = pseudo_label_summary(run.metrics_path)
    flops = {stage: facts["flops"] for stage, facts in stages.items()}
    result["training_flops"] = flops | {"total": sum(flops.values()) - flops.get("baseline", 0)}
    result["images_per_second"] = {s: f["images_per_second"] for s, f in stages.items() if "images_per_second" in f}
    result["seconds"] = round(sum(facts["seconds"] for facts in stages.values()), 2)
    looked = recipe.data.remove_leaks
    result["data_guards"] = {
        "duplicates_removed": sum(not leak["labeled"] for leak in splits.leaks) if looked else None,
        "near_duplicates_looked_for": looked and looks_for_near(begun.source),
        "outliers": outliers,
    }
    result["test_images"], result["test_is_val"] = len(test.ids), splits.test_is_val
    result["input"] = [begun.preprocess.channels, begun.preprocess.height, begun.preprocess.width]
    if begun.ranks.is_first:
        add_predictions(run, "test", test.ids, test.labels.numpy(), {n: z.numpy() for n, z in logits.items()})
        write_json(run.result_path, result)
        if not recipe.engine.keep_checkpoints:
            shutil.rmtree(run.checkpoint_path, ignore_errors=True)
    return result


def _pretrained(begun: Begun, stages: dict[str, Any]) -> dict[str, Any] | None:
    """What the stage "pretrain" made; parameters of the backbone alone, since nothing else is always kept."""
    config, facts = begun.recipe.pretrain, stages.get("pretrain")
    if config is None or facts is None:
        return None
    spec = begun.pretrained_spec(config.of)
    with torch.device("meta"):
        params = num_params(build(spec).backbone)
    return {
        "of": config.of,
        "arch": spec.arch,
        "params": params,
        "steps": facts["steps"],
        "knn_accuracy": facts["knn_accuracy"],
        "seconds": facts["seconds"],
    }


def _trusted(begun: Begun) -> tuple[dict[str, Any], int | None]:
    """What result.json says of the trusted set, and how many outliers were found, where they were looked for."""
    trusted, truth = load_trusted(begun.run.trusted_path), held_back_truth(begun.splits)
    outliers = None if begun.recipe.outliers.score == "none" else int((trusted.why == OUTLIER).sum())
    summary = trusted.summary(truth, len(begun.source.classes))
    return summary | compare_with_confidence(trusted, truth, begun.recipe.seed), outliers


def _score(
    begun: Begun, path: Path, plan: EnginePlan, test: SplitImages, val: SplitImages | None
) -> tuple[dict[str, Any], Tensor]:
    loaded = load_model(path)
    network = as_planned(loaded.module.to(begun.device), plan)
    if loaded.preprocess != begun.preprocess:  # a ready teacher of another input size
        test = begun.load(begun.splits.test, loaded.preprocess)
        val = None if val is None else begun.load(begun.splits.val, loaded.preprocess)
    mean, std = columns(loaded.preprocess, begun.device)
    logits = predict(network, test.images, mean, std, plan, begun.ranks)
    val_logits = predict(network, val.images, mean, std, plan, begun.ranks) if val is not None else None
    return {
        "arch": loaded.arch,
        "params": num_params(network),
        "val_accuracy": None if val is None or val_logits is None else accuracy(val_logits, val.labels),
        "test_accuracy": accuracy(logits, test.labels),
    }, logits
