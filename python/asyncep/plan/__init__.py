"""`asyncep plan`: which strategy, group and batch for a model, devices, a link and a workload."""
