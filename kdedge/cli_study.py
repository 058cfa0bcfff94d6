"""`kdedge study`: what contrastive pre-training gives on these images, and whether published findings hold here."""

from pathlib import Path

import click

from kdedge.cli_common import Interrupted, Reply, command_output, note

__all__ = ["study"]


@click.group()
def study() -> None:
    """Ask a published question of your own images, over seeds."""


@study.command()
@click.option(
    "--data", metavar="SPEC", multiple=True,
    help="A folder of images, a .csv, or a name such as digits; repeatable. The first is pre-trained on, the others "
    "are transferred to.",
)  # fmt: skip
@click.option("--plan", metavar="NAME|FILE", help="What is run; 'digits', minutes on a laptop, unless given.")
@click.option("--seeds", type=click.IntRange(min=1), metavar="K", help="How many seeds; the plan's unless given.")
@click.option("--first-seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="S")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one key of the plan; repeatable.")
@click.option("--device", metavar="auto|cpu|cuda[:N]", help="Where to train.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="The folder; runs/study-... unless given.")
@command_output
def simclr(
    data: tuple[str, ...],
    plan: str | None,
    seeds: int | None,
    first_seed: int,
    settings: tuple[str, ...],
    device: str | None,
    out: Path | None,
) -> Reply:
    """SimCLR: fine-tuning with few labels, distillation, transfer.

    Three tables with intervals over seeds, and for each hypothesis one answer by a rule that was written down before:
    supported, no evidence, contradicted. The same command goes on with a study that was stopped; two at once share the
    work. study.html in its folder is what is known so far.
    """
    from kdedge.cli_display import open_display
    from kdedge_bench.study import command_of
    from kdedge_bench.study import study as make
    from kdedge_bench.study_plan import make_study_plan
    from kdedge_bench.study_text import markdown
    from kdedge_bench.work import Work

    asked = (*settings, *((f"engine.device={device}",) if device else ()))
    planned = make_study_plan(plan, data=data, seeds=seeds, first_seed=first_seed, settings=asked)
    folder = out or planned.default_folder
    try:
        document = make(planned, folder, Work(open_display, note))
    except KeyboardInterrupt:
        raise Interrupted(
            "Stopped by Ctrl-C. What was trained is kept, up to the last checkpoint some seconds ago; the tables so "
            f"far are in {folder / 'study.html'}. Go on with: {command_of(planned, folder)}"
        ) from None
    return Reply(document, markdown(document))
