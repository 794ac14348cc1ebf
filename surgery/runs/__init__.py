"""A run's folder, settings, sweeps, comparison, and the one report."""
