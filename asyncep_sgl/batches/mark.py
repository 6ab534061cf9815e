"""How the tokenizer knows a batch's request: it is served in the context of the task that sent it."""

from contextvars import ContextVar

in_batch: ContextVar[bool] = ContextVar("asyncep_in_batch", default=False)
"""Whether the request being served belongs to a batch."""
