"""Steering: answers under a suppression or an amplification of parts of the prompt."""
