"""What TensorRT's log lines mean: the class of the failure, and the remedy.

TensorRT answers None or False and explains itself in its log. The texts are those of the libraries 8.5 to 11.
"""

from typing import Any, NamedTuple, Sequence, Tuple, Type

from kdedge_device.failures import CorruptFailure, DeviceFailure, Failure, RuntimeFailure, VersionFailure

__all__ = ["classify", "must"]

REBUILD = "Build the engine again on this machine with: python run.pyz build --rebuild"


class _Rule(NamedTuple):
    texts: Tuple[str, ...]
    failure: Type[Failure]
    remedy: str


# In this order: a missing driver makes everything behind it fail too, and a general line follows a precise one.
_RULES = (
    _Rule(
        (
            "CUDA initialization failure",
            "CUDA driver version is insufficient",
            "Failed to query CUDA driver version",
            "no CUDA-capable device",
            "unsupported display driver / cuda driver combination",
        ),
        RuntimeFailure,
        "Install or update the NVIDIA driver of this machine.",
    ),
    _Rule(
        (
            "not compatible with this version of TensorRT",
            "Version tag does not match",
            "old deserialization call on a newer plan file",
            "getEngineHostCodeAllowed() is false",
        ),
        VersionFailure,
        REBUILD,
    ),
    _Rule(
        (
            "generated on an incompatible device",
            "Platform specific tag mismatch",
            "only supported on the target runtime platform",
            # 8.5 says "is not recommended" and goes on; that one is a warning and no error.
            "across different models of devices is not supported",
        ),
        DeviceFailure,
        REBUILD,
    ),
    _Rule(
        (
            "Magic tag does not match",
            "Cannot deserialize empty blob",
            "Cannot deserialize with an empty memory buffer",
            "Serialization assertion",
            "Post deserialization check failure",
        ),
        CorruptFailure,
        REBUILD,
    ),
    _Rule(
        ("Could not find any implementation for node",),
        Failure,
        "Give the builder more memory with --workspace-mib, or leave that layer in float when exporting.",
    ),
    _Rule(
        ("out of memory", "OutOfMemory", "insufficient memory"),
        Failure,
        "Close other programs on the GPU, or lower --workspace-mib or --batch.",
    ),
    _Rule(
        ("No importer registered for op", "UNSUPPORTED_NODE", "Plugin not found", "unsupported opset"),
        VersionFailure,
        "Update TensorRT, or export the model with fewer operators of its own.",
    ),
)


def classify(errors: Sequence[str], what: str) -> Failure:
    """The Failure to raise for error lines of TensorRT's log; `what` failed, as the beginning of a sentence."""
    for rule in _RULES:
        for line in errors:
            if any(text.lower() in line.lower() for text in rule.texts):
                return rule.failure(f"{what}: {_short(line)} {rule.remedy}")
    told = _short(errors[0]) if errors else "TensorRT gives no reason."
    return Failure(f"{what}: {told}")


def must(answer: Any, errors: Sequence[str], what: str) -> Any:
    """`answer` itself; where TensorRT answered None or False, the Failure that its log explains."""
    if answer is None or answer is False:
        raise classify(errors, what)
    return answer


def _short(line: str) -> str:
    text = " ".join(line.split())[:400]
    return text if text.endswith(".") else text + "."
