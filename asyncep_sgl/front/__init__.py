"""The front: what stands between HTTP clients and SGLang's server. Who asks, what may be asked, and how much of it."""
