"""What is asked of a model: rows of text, the prompt around them, labels, and what became of it."""
