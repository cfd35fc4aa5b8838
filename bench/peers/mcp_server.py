"""The server of the Model Context Protocol's own SDK, as its documentation shows.

With "json" it answers in JSON and keeps no sessions, which is its quickest.
"""

import sys

from mcp.server.mcpserver import MCPServer

server = MCPServer("bench", log_level="ERROR")


@server.tool()
async def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
async def echo(text: str) -> str:
    """Answer with the text."""
    return text


is_plain = sys.argv[2:] == ["json"]
server.run(
    "streamable-http", host="127.0.0.1", port=int(sys.argv[1]),
    json_response=is_plain, stateless_http=is_plain,
)  # fmt: skip
