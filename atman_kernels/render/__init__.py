"""Explanations for the eye: HTML pages and terminals. Knows no model."""

# Colour-blind-safe hues for every heatmap; black text stays readable on either at full strength.
POSITIVE, NEGATIVE = "#f2792b", "#6aa3f8"
