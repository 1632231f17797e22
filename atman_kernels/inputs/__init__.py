"""What is asked of a model: prompts, images and audio as tokens, units and targets."""
