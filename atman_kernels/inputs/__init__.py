"""What is asked of a model: prompts, images and recordings as tokens, units and targets."""
