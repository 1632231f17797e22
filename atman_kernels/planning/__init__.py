"""What is computed before a model is asked: units of a text, factors, packs and what variants share."""
