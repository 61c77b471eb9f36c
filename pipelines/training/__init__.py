"""Parts of the training stages: driver, workers, data, logs, health, time books."""
