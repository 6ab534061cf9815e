"""Each host, or device, keeps a part of the experts; weights travel ahead of the computation (AsyncEP)."""
