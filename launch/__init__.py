"""Slurm launchers: readable sbatch files and what they share."""
