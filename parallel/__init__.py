"""What training and serving share: mesh, collectives, shard table, parallel layers, kernels, models.

Import what you need from its module (``from parallel.mesh import Mesh``); this package itself imports nothing.
"""

__all__: list[str] = []
