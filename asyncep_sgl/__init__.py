"""AsyncEP plug-in for SGLang: prefill-only serving of Mixture-of-Experts models."""
