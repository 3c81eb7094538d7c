"""Pipeline parallelism: schedules as data, and the executor that runs them. Nothing is here yet."""

__all__: list[str] = []
