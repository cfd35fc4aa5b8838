"""Public JSON-RPC libraries, unmodified."""

from __future__ import annotations

from typing import Any

import pytest

from support import http, needs, rpc_manager, served


async def test_json_rpc_library_of_the_public_works_unmodified_over_websocket() -> None:
    needs("jsonrpc_websocket", "aiohttp")
    import aiohttp
    import jsonrpc_base
    import jsonrpc_websocket

    told: list[Any] = []
    async with served(rpc_manager()) as server, aiohttp.ClientSession() as session:
        url = f"ws://127.0.0.1:{server.port}/ws"
        library = jsonrpc_websocket.Server(url, session=session)
        library.command_progress = lambda **params: told.append(params["progress"])
        await library.ws_connect()
        try:
            assert await library.subtract(42, 23) == 19
            assert await library.subtract(minuend=42, subtrahend=23) == 19
            assert await library.sum(1, 2, 4) == 7
            answer = await library.execute_command(command="countdown 0.01")
            assert answer["result"] == {"remaining": 0, "percent": 100}
            assert [each["percent"] for each in told] == [0, 100]
            with pytest.raises(jsonrpc_base.ProtocolError) as caught:
                await library.foobar()
            assert caught.value.args[0] == -32601
            await library.update(1, 2, 3, 4, 5, _notification=True)
            assert (await library.get_status())["command"]["state"] == "running"
            assert server.manager.notified == [[1, 2, 3, 4, 5]]  # type: ignore[attr-defined]
        finally:
            await library.close()


async def test_json_rpc_library_of_the_public_works_unmodified_over_http() -> None:
    needs("jsonrpcclient")
    import jsonrpcclient

    async with served(rpc_manager()) as server:
        request = jsonrpcclient.request("subtract", params=[42, 23])
        _, answer = await http(server, "POST", "/rpc", request)
        assert jsonrpcclient.parse(answer) == jsonrpcclient.Ok(19, request["id"])
        _, answer = await http(server, "POST", "/rpc", jsonrpcclient.request("foobar"))
        parsed = jsonrpcclient.parse(answer)
        assert isinstance(parsed, jsonrpcclient.Error) and parsed.code == -32601
        batch = [jsonrpcclient.request("sum", params=(1, 2, number)) for number in range(3)]
        _, answer = await http(server, "POST", "/rpc", batch)
        assert sorted(each.result for each in jsonrpcclient.parse(answer)) == [3, 4, 5]
        silent = jsonrpcclient.notification("update", params=[1, 2, 3, 4, 5])
        assert await http(server, "POST", "/rpc", silent) == (204, b"")
