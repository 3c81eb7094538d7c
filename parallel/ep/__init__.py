"""Expert parallelism: router, dispatch and experts. Nothing is here yet."""

__all__: list[str] = []
