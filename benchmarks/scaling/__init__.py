"""Time and memory of explanation methods over model size and prompt length: `python -m benchmarks.scaling`."""
