"""Hugging Face models: suppression of any forward, capture of a base run, packed forwards, loading."""
