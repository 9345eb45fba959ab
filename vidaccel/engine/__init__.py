"""The hot path: what time it is in the denoising, which policy holds, and what attention then runs."""
