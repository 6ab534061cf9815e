"""The router inside the engine: it takes the place of SGLang's controller and keeps the ranks running."""
