"""Models that read images: where the patches of each are, and what becomes of them."""
