"""How large the measurements on a GPU are: at full size, and as a toy that any CPU can run."""

from dataclasses import dataclass

__all__ = ["REAL", "TOY", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """How large everything is. The toy shrinks numbers; the code is the same."""

    labels: tuple[int, ...]  # of the rows
    students: tuple[str, ...]  # taught by the outer network of `student_labels`
    student_labels: int
    pilot_steps: int
    steps: tuple[int, int]  # the least and the most that the horizon may be
    least_s: float  # a run is not begun, or gone on with, where less is left of the slice
    race_s: float  # nor a race, which cannot be gone on with
    races: tuple[tuple[str, str], ...]  # network and precision of each
    race: tuple[str, ...]
    profile_s: float  # least time of a profile
    profiles: tuple[tuple[str, str], ...]  # network, and mode of torch.compile of its backbone and views
    profile: tuple[str, ...]
    settings: tuple[str, ...] = ()  # of every run
    of_rows: tuple[str, ...] = ()
    of_students: tuple[str, ...] = ()
    images_a_class: int | None = None  # None: all, and the archive must be the known one


REAL = Sizes(
    labels=(4000, 250, 40),
    students=("mobilenet-v2", "mobilenet-v3-small"),
    student_labels=250,
    pilot_steps=200,
    steps=(200, 2**20),
    least_s=40.0,
    race_s=240.0,  # of which compiling two candidates may take half
    races=tuple(
        (network, precision) for network in ("wide-resnet-28-2", "mobilenet-v2") for precision in ("fp32", "bf16")
    ),
    race=(
        *("--sides", "published", "supervised", "--workers", "16"),
        *("--labeled", "64", "--ratio", "7", "--rounds", "3", "--seconds", "2"),
    ),
    profile_s=150.0,  # of which compiling may take most
    profiles=tuple(
        (network, mode) for network in ("wide-resnet-28-2", "mobilenet-v2") for mode in ("none", "reduce-overhead")
    ),
    profile=("--precision", "bf16", "--layers", "torch", "--labeled", "64", "--ratio", "7", "--steps", "30"),
)
TOY = Sizes(
    labels=(20,),
    students=("mobilenet-v2",),
    student_labels=20,
    pilot_steps=4,
    steps=(6, 6),
    least_s=0.0,
    race_s=0.0,
    races=(("wide-resnet-10-1", "fp32"),),
    race=(
        *("--sides", "supervised", "--workers", "1", "--threads", "1", "--plan", "{}"),
        *("--labeled", "2", "--ratio", "1", "--rounds", "1", "--seconds", "0.1"),
    ),
    profile_s=0.0,
    profiles=(("wide-resnet-10-1", "none"),),
    profile=("--labeled", "2", "--ratio", "1", "--steps", "1", "--threads", "1"),
    settings=(
        "data.image_px=8",
        "teacher.arch=wide-resnet-10-1",
        "teacher.optim.labeled_batch=4",
        "teacher.optim.unlabeled_ratio=2",
        "student.optim.labeled_batch=4",
        "student.optim.unlabeled_ratio=2",
        "baseline.optim.labeled_batch=4",
        "engine.log_every_steps=1",
        "engine.checkpoint_every_s=0",  # at every step, so that a test may stop it anywhere
        "engine.plan={threads: 1}",
    ),
    of_rows=("student.arch=wide-resnet-10-1",),
    of_students=("student.width=0.25",),
    images_a_class=8,
)
