"""Models in torch: loading, running, losses, devices."""
