"""How a model's attention is reached, and what is put in its place."""
