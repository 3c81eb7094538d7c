"""Model definitions: one decoder, one small file a family."""

__all__: list[str] = []
