"""Host side of the kernels: launch choices and the per-step driver of the recurrence."""
