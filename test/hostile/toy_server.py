"""A server that a body ends (`die`), that answers another with 500 (`bad`) and never answers a third (`hang`)."""

from __future__ import annotations

import asyncio
import json
import os
import sys


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next((int(line.split(b":")[1]) for line in head.splitlines() if line.startswith(b"content-length")), 0)
    body = json.loads(await reader.readexactly(length) or b"{}")
    if "hang" in body:
        return
    if body.get("die", 0) > 1000:
        os._exit(1)
    status, answer = ("500 Oops", b'{"error": "n is bad"}') if body.get("bad", 0) > 1000 else ("200 OK", b"{}")
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(answer)}\r\n\r\n".encode()
    writer.write(head + answer)
    await writer.drain()
    writer.close()


async def main() -> None:
    server = await asyncio.start_server(handle, "127.0.0.1", int(sys.argv[1]))
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


asyncio.run(main())
