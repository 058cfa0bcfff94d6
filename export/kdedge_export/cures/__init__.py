"""What brings an INT8 file nearer to its float file without training, and which layers lose most."""

__all__: list[str] = []
