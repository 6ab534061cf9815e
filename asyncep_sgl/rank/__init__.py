"""What runs inside a rank, that is, inside SGLang's scheduler: kernels, batches, reports."""
