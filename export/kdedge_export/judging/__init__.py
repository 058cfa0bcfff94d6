"""Which file ships, and the proof of every file."""

__all__: list[str] = []
