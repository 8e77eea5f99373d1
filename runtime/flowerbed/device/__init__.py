"""What runs on a device: see `supervisor`, which starts everything else."""
