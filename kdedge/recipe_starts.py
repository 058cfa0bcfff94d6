"""What each network of a recipe starts from, and which of these a recipe cannot mean."""

from typing import TYPE_CHECKING

from kdedge.methods.supervised import FineTuneConfig

if TYPE_CHECKING:
    from kdedge.recipe import Recipe, StudentConfig, TeacherConfig

__all__ = ["PRETRAINED", "TEACHERS_WEIGHTS", "misfit"]

TEACHERS_WEIGHTS = "teacher"
"""`student.init` with this value starts the inner network from the outer one's weights."""

PRETRAINED = "simclr"
"""`init` with this value starts a network from what the run's own stage "pretrain" leaves."""


def misfit(recipe: "Recipe") -> str | None:
    """A sentence about what does not go together, or None; known from the recipe alone, before any image is read."""
    for who, network in (("teacher", recipe.teacher), ("student", recipe.student)):
        if network is not None and (sentence := _start(recipe, who, network)):
            return sentence
    return _unused_pretraining(recipe) or _unasked_teacher(recipe)


def _start(recipe: "Recipe", who: str, network: "TeacherConfig | StudentConfig") -> str | None:
    if network.init == PRETRAINED:
        if recipe.pretrain is None:
            return (
                f"{who}.init is '{PRETRAINED}', and the recipe has no pretrain. Add one (--set pretrain.of={who}), or "
                f"set {who}.init to the pretrained.safetensors of another run."
            )
        if recipe.pretrain.of != who:
            return (
                f"{who}.init is '{PRETRAINED}', and pretrain.of is '{recipe.pretrain.of}': a run pre-trains one "
                f"network. Set pretrain.of={who}, or leave {who}.init out."
            )
    if network.init is None and network.projection_layers:
        return (
            f"{who}.projection_layers is {network.projection_layers}, and {who}.init is null: there is no projection "
            f"head to keep layers of. Set {who}.init={PRETRAINED}, or leave {who}.projection_layers out."
        )
    if isinstance(network.method, FineTuneConfig) and network.method.train == "head" and network.init is None:
        return (
            f"{who}.method trains the head only, and {who}.init is null: its features would be those of random "
            f"weights. Set {who}.init, or {who}.method.train=all."
        )
    return None


def _unused_pretraining(recipe: "Recipe") -> str | None:
    if recipe.pretrain is None:
        return None
    who = recipe.pretrain.of
    network = recipe.teacher if who == "teacher" else recipe.student
    if network is None:
        return (
            "pretrain.of is 'teacher', and the recipe has none (teacher is null). Set pretrain.of=student, or leave "
            "pretrain out."
        )
    if recipe.teacher is not None and who == "teacher" and recipe.teacher.ready is not None:
        return (
            "pretrain.of is 'teacher', and teacher.ready names one that is trained already. Leave one of the two out."
        )
    if network.init != PRETRAINED:
        return (
            f"The recipe pre-trains the {who}, and nothing starts from that: {who}.init is {_shown(network.init)}. Set "
            f"{who}.init={PRETRAINED}, or leave pretrain out."
        )
    return None


def _unasked_teacher(recipe: "Recipe") -> str | None:
    student = recipe.student
    if recipe.teacher is None or not isinstance(student.method, FineTuneConfig) or student.init == TEACHERS_WEIGHTS:
        return None
    return (
        "student.method is fine-tune, which learns from labels alone, and the recipe has a teacher that nobody would "
        f"ask. Set teacher=null, or student.init={TEACHERS_WEIGHTS}, or another student.method."
    )


def _shown(init: str | None) -> str:
    return "null" if init is None else f"'{init}'"
