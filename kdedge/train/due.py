"""Is it time? Pure functions, so that the loop needs no hooks."""

__all__ = ["due", "to_steps"]


def due(step: int, every: int, total: int) -> bool:
    """True at every `every`-th finished step and at the last one. `step` counts finished steps from 1."""
    return step == total or (every > 0 and step % every == 0)


def to_steps(
    total_steps: int | None, total_epochs: int | None, total_images: int | None, *, batch: int, images_an_epoch: int
) -> int | None:
    """A duration in any one unit as steps of `batch` images, rounded up; None for none, ValueError for two."""
    units = {"total_steps": total_steps, "total_epochs": total_epochs, "total_images": total_images}
    given = [name for name, value in units.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are both set; a duration has one unit. Keep one of them.")
    if total_epochs is not None:
        return -(-total_epochs * images_an_epoch // batch)
    if total_images is not None:
        return -(-total_images // batch)
    return total_steps
