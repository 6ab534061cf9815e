"""OpenAI's Batch API on our server: files of requests in, files of answers out. `docs/use/batches.md` is the page."""
