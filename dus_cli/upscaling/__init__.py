"""The verb upscale."""
