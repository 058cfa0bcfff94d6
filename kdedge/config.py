"""The base of every config object: pydantic, strict, frozen, unknown keys refused."""

from pydantic import BaseModel, ConfigDict

__all__ = ["Config"]


class Config(BaseModel):
    """Typed settings, defined beside the code that reads them; `kdedge.recipe` only composes them."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, serialize_by_alias=True)
