"""What values the tensors take, and which of them 8 bits keep."""

__all__: list[str] = []
