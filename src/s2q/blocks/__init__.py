"""One block: its task, its students, distillation, rounding, packing."""
