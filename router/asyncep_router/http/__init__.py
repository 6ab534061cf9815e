"""The router across nodes: an HTTP process in front of SGLang servers, every rank behind them in view."""
