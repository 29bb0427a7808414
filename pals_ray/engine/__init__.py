"""What runs inside vLLM's processes: scheduler, stat logger, worker extension, paced worker, and the control block."""
