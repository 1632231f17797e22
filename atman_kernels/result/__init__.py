"""What an explanation holds, and how it is shown: JSON, HTML, terminal, plots, an image's overlay."""

# Colour-blind-safe hues for every heatmap; black text stays readable on either at full strength.
POSITIVE, NEGATIVE = "#f2792b", "#6aa3f8"
