"""The server: what clients of OpenAI's interface send, answered by an engine in this or another process.

Import what you need from its module (``from infer.server.app import create_app``); this package itself imports nothing.
"""

__all__: list[str] = []
