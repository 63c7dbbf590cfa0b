"""Flow and FedAvg on problems whose optimum is known exactly."""
