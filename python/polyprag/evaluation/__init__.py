"""Questions, metrics, controls, statistics and reports. Nothing here imports torch."""
