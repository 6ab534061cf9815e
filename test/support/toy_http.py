"""The toy model behind HTTP, as a process: for tests of commands and their signals.

    python toy_http.py PORT [SECONDS]

SECONDS is what each request takes.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

sys.path.insert(0, str(Path(__file__).parent))

from toy_model import next_logs


def answer(ids: list[int], wanted: list[int], start: int) -> dict[str, Any]:
    """As SGLang's ``/generate`` has it."""
    logs = next_logs(ids)
    own = [] if start < 0 else [[float(next_logs(ids[:i])[ids[i]]), ids[i], None] for i in range(start + 1, len(ids))]
    return {
        "meta_info": {
            "prompt_tokens": len(ids),
            "cached_tokens": 0,
            "output_token_ids_logprobs": [[[float(logs[token]), token, None] for token in wanted]],
            "input_token_logprobs": own,
        }
    }


def app(seconds: float) -> web.Application:
    """Its endpoints."""

    async def generate(request: web.Request) -> web.Response:
        body: dict[str, Any] = orjson.loads(await request.read())
        await asyncio.sleep(seconds)
        prompts: list[list[int]] = body["input_ids"]
        wanted = body["token_ids_logprob"]
        each = wanted if wanted and isinstance(wanted[0], list) else [wanted] * len(prompts)
        starts = body.get("logprob_start_len") or [-1] * len(prompts)
        found = [answer(ids, w or [], start) for ids, w, start in zip(prompts, each, starts, strict=True)]
        return web.Response(body=orjson.dumps(found), content_type="application/json")

    async def server_info(_: web.Request) -> web.Response:
        return web.json_response({"dp_size": 2, "page_size": 4, "max_req_input_len": 4000})

    async def model_info(_: web.Request) -> web.Response:
        return web.json_response({"model_path": "toy", "tokenizer_path": "toy"})

    async def tokenize(request: web.Request) -> web.Response:
        body = await request.json()
        if "prompt" not in body:
            return web.json_response({"error": {"message": "no chat template"}}, status=400)
        prompts = body["prompt"]
        return web.json_response({"tokens": [list(prompt.encode()) for prompt in prompts]})

    made = web.Application(client_max_size=1 << 30)
    made.add_routes(
        [
            web.post("/generate", generate),
            web.post("/tokenize", tokenize),
            web.get("/server_info", server_info),
            web.get("/model_info", model_info),
        ]
    )
    return made


if __name__ == "__main__":
    web.run_app(
        app(float(sys.argv[2]) if len(sys.argv) > 2 else 0.0), host="127.0.0.1", port=int(sys.argv[1]), print=None
    )
