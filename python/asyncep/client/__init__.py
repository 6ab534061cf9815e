"""From token ids to log-probabilities, many at once: planning, sending, and what the runtime and jobs build on."""
