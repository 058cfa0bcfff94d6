"""The recipes that ship with kdedge: YAML files, read by kdedge.recipe_io. `recipes/README.md` is their catalog."""

__all__: list[str] = []
