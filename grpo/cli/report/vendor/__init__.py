"""Other people's code, unmodified: uPlot 1.6.32, the files of `dist/` in npm's package `uplot`. MIT: `LICENSE.uplot.txt`."""
