"""What is known of a model before it runs: its task, its parts, whether it packs, its memory."""
