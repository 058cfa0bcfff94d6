"""`kdedge verdict`: does KD-FixMatch help on these images?"""

from pathlib import Path

import click

from kdedge.cli_common import Interrupted, Reply, command_output, note

__all__ = ["verdict"]


@click.command()
@click.argument("recipe")
@click.option("--data", metavar="SPEC", help="A folder of images, a .csv, or a name such as digits or cifar10.")
@click.option("--labels", type=click.IntRange(min=1), metavar="N", help="Labelled images to use in all.")
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True, metavar="K", help="How many seeds.")
@click.option("--first-seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="S")
@click.option("--rows", metavar="NAME,NAME", help="Only these rows, and those they need; all unless given.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one key of the recipe; repeatable.")
@click.option("--device", metavar="auto|cpu|cuda[:N]", help="Where to train.")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="The folder; runs/verdict-... unless given."
)
@command_output
def verdict(
    recipe: str,
    data: str | None,
    labels: int | None,
    seeds: int,
    first_seed: int,
    rows: str | None,
    settings: tuple[str, ...],
    device: str | None,
    out: Path | None,
) -> Reply:
    """Judge KD-FixMatch against its parts, over seeds.

    Supervised, KD only, FixMatch alone at equal steps and at equal total compute, KD-FixMatch and KD-FixMatch without
    each of its parts. The same command goes on with a verdict that was stopped; two at once share the work.
    verdict.md in its folder is the table so far.
    """
    from kdedge.cli_display import open_display
    from kdedge_bench.verdict import command_of
    from kdedge_bench.verdict import verdict as judge
    from kdedge_bench.verdict_plan import make_plan
    from kdedge_bench.verdict_text import markdown

    wanted = None if rows is None else [name.strip() for name in rows.split(",") if name.strip()]
    chosen = range(first_seed, first_seed + seeds)
    plan = make_plan(recipe, settings, seeds=chosen, rows=wanted, data=data, labels=labels, device=device)
    folder = out or plan.default_folder
    try:
        document = judge(plan, folder, display=open_display, say=note)
    except KeyboardInterrupt:
        raise Interrupted(
            "Stopped by Ctrl-C. What was trained is kept, up to the last checkpoint some seconds ago; the table so far "
            f"is {folder / 'verdict.md'}. Go on with: {command_of(plan, folder)}"
        ) from None
    return Reply(document, markdown(document))
