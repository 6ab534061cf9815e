"""A server that answers ``/generate`` at once, without a model: what is left is the cost of asking.

    python bench/null_generate.py PORT TOKENIZER_FOLDER

It says of itself what `asyncep.client.server_facts` asks for. Scores are a fixed function of a prompt's last tokens.
"""

from __future__ import annotations

import sys
from typing import Any

import orjson
from aiohttp import web

TOKENIZER = ""


def scores(ids: list[int], labels: list[int]) -> list[float]:
    """Log-probabilities that add up to nothing in particular, but differ from row to row."""
    return [-1.0 - (sum(ids[-6:]) + label) % 7 for label in labels]


async def generate(request: web.Request) -> web.Response:
    """Prompts as token ids, single-token labels."""
    body: dict[str, Any] = orjson.loads(await request.read())
    labels = body["token_ids_logprob"]
    answers = [
        {
            "meta_info": {
                "prompt_tokens": len(ids),
                "cached_tokens": 0,
                "output_token_ids_logprobs": [
                    [[score, label, None] for score, label in zip(scores(ids, labels), labels, strict=True)]
                ],
            }
        }
        for ids in body["input_ids"]
    ]
    return web.Response(body=orjson.dumps(answers), content_type="application/json")


async def server_info(_: web.Request) -> web.Response:
    """Two ranks, nothing cached."""
    return web.json_response({"dp_size": 2, "page_size": 16, "max_req_input_len": 4096})


async def model_info(_: web.Request) -> web.Response:
    """Where its tokenizer is."""
    return web.json_response({"model_path": "null", "tokenizer_path": TOKENIZER})


async def tokenize(request: web.Request) -> web.Response:
    """With the tokenizer itself, for the client's comparison."""
    from tokenizers import Tokenizer

    body = await request.json()
    tokenizer = Tokenizer.from_file(f"{TOKENIZER}/tokenizer.json")
    found = tokenizer.encode_batch(body["prompt"], add_special_tokens=body["add_special_tokens"])
    return web.json_response({"tokens": [encoding.ids for encoding in found]})


def main() -> None:
    """Serves until killed."""
    global TOKENIZER
    TOKENIZER = sys.argv[2]
    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/generate", generate)
    app.router.add_post("/tokenize", tokenize)
    app.router.add_get("/server_info", server_info)
    app.router.add_get("/model_info", model_info)
    app.router.add_get("/health", model_info)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None, access_log=None)


if __name__ == "__main__":
    main()
