"""Is it time? Pure functions, so that the loop needs no hooks."""

__all__ = ["due", "to_steps"]


def due(step: int, every: int, total: int) -> bool:
    """True at every `every`-th finished step and at the last one. `step` counts finished steps from 1."""
    return step == total or (every > 0 and step % every == 0)


def to_steps(
    total_steps: int | None, total_epochs: int | None, total_images: int | None, *, batch: int, images_an_epoch: int
) -> int | None:
    """A duration in any one unit as steps, rounded up; None where none is given, ValueError where two are."""
    given = [name for name, value in _named(total_steps, total_epochs, total_images) if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are both set; a duration has one unit. Keep one of them.")
    if total_epochs is not None:
        return -(-total_epochs * images_an_epoch // batch)
    if total_images is not None:
        return -(-total_images // batch)
    return total_steps


def _named(steps: int | None, epochs: int | None, images: int | None) -> list[tuple[str, int | None]]:
    return [("total_steps", steps), ("total_epochs", epochs), ("total_images", images)]
