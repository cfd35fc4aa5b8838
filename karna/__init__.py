"""What `karna_ws.py` and `services.py` stand on: small rooms, one idea each, imports one way.

Each room's docstring says what it is, what it may touch and who uses it; nothing here imports
`karna_ws` or `services`. README.md beside this file walks a request through them, lists them, and
has the wire in full. `karna.client` stands apart: it needs `karna.text` alone.
"""
