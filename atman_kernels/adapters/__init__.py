"""Ways into this package from other explanation libraries; each module needs its library, the package needs none."""
