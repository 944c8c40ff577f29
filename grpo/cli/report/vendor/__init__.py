"""Other people's code, unmodified: uPlot 1.6.32 from npm (`npm pack uplot@1.6.32`, its `dist/`), MIT, see `LICENSE.uplot.txt`."""
