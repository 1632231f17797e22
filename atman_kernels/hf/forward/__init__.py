"""Forwards of an unmodified model: base runs, packs, full rows, gradients."""
